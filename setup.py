"Hands settings.ini to setuptools; the rest of the metadata is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = cfg['DEFAULT']
def words(k): return cfg[k].split()

setup(
    description=cfg['description'], author=cfg['author'],
    license_expression=cfg['license'], keywords=words('keywords'), install_requires=words('requirements'),
    extras_require={k: words(f'{k}_requirements') for k in ('distributed','export','pretrained','search','docs')}|dict(
        dev=[o for k in ('dev','docs','distributed','export','pretrained','search') for o in words(f'{k}_requirements')]),
    entry_points=dict(console_scripts=words('console_scripts'), nbdev=['reid_fastai=reid_fastai._modidx:d']),
)
