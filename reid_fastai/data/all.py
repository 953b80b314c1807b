from .datasets import *
from .holdout import *
from .synthetic import *
from .sampler import *
from .augment import *
from .image import *
from .boxes import *
from .block import *
