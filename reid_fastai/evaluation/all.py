from .distances import *
from .metrics import *
from .nearest import *
from .rerank import *
