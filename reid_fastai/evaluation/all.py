from .distances import *
from .counting import *
from .ranked import *
from .metrics import *
from .nearest import *
from .pairs import *
from .verification import *
from .rerank import *
