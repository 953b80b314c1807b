from .regularizer import *
from .history import *
from .evaluation import *
from .checks import *
from .distributed import *
from .checkpoint import *
