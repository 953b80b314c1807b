from .regularizer import *
from .history import *
from .evaluation import *
from .checks import *
from .precision import *
from .checkpoint import *
