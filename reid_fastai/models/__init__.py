"Networks: every public name of the modules, and every method registered"
from . import all as _all
from .all import *

__all__ = [o for o in vars(_all) if o[0]!='_']  # without the modules themselves: one is called `all`
