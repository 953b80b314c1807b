from .distances import *
from .metrics import *
from .rerank import *
