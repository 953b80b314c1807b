from .distances import *
from .metrics import *
