from .regularizer import *
from .history import *
from .evaluation import *
from .checks import *
from .distributed import *
from .precision import *
from .checkpoint import *
