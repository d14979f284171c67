"Build the package from the facts in settings.ini."

import configparser, re
from pathlib import Path
from setuptools import setup, find_packages

here = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=['='], comment_prefixes=['#'])
ini.read(here / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lines = lambda key: [l.strip() for l in cfg[key].splitlines() if l.strip()]
version = re.search(r'__version__ = "(.+)"', (here / cfg['name'] / '__init__.py').read_text())[1]
extras = {o.removesuffix('_requirements'): lines(o) for o in ini.defaults() if o.endswith('_requirements')}

setup(
    name=cfg['name'],
    version=version,
    description=cfg['description'],
    author=cfg['author'],
    license=cfg['license'],
    keywords=cfg['keywords'],
    python_requires='>=' + cfg['min_python'],
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[cfg['name'], cfg['name'] + '.*']),
    package_data={cfg['name']: ['templates/*', 'results/*.json']},
    install_requires=lines('requirements'),
    extras_require=extras,
    entry_points={
        'console_scripts': lines('console_scripts'),
        'nbdev': [f"{cfg['name']}={cfg['name']}._modidx:d"],
    },
)
