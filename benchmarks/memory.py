"Memory of a process, and time of a call"
import re, resource, sys, time
from pathlib import Path

def peak():
    "The most memory that this process has used, GB. On Linux `ru_maxrss` of a new process includes the peak of the one that started it, VmHWM does not"
    if (status := Path('/proc/self/status')).exists(): return int(re.search(r'VmHWM:\s+(\d+) kB', status.read_text())[1])*1024/1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1e9 if sys.platform=='darwin' else 1e6)

def timed(f, *args):
    "Seconds that `f` takes, and its result"
    t = time.perf_counter()
    res = f(*args)
    return time.perf_counter()-t,res
