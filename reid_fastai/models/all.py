from .backbone import *
from .weights import *
from .net import *
from .osnet import *
from .rga import *
from .ianet import *
from .batnet import *
from .depthwise import *
