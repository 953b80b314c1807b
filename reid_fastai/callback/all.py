from .arrays import *
from .regularizer import *
from .rotation import *
from .rivals import *
from .history import *
from .evaluation import *
from .checks import *
from .checkpoint import *
