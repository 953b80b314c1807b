from .regularizer import *
from .history import *
from .evaluation import *
from .checkpoint import *
