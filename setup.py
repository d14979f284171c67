"Build the package from the facts in settings.ini."
import configparser
import re
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
settings = configparser.ConfigParser(delimiters=['='], comment_prefixes=['#'])
settings.read(here/'settings.ini', encoding='utf-8')
config = settings['DEFAULT']
name = config['name']


def items(key):
    "The lines of a setting."
    return [line.strip() for line in config[key].splitlines() if line.strip()]


version = re.search(r'__version__ = "(.+)"', (here/name/'__init__.py').read_text())[1]
extras = [key for key in settings.defaults() if key.endswith('_requirements')]

setup(
    name=name,
    version=version,
    description=config['description'],
    author=config['author'],
    license=config['license'],
    keywords=config['keywords'],
    python_requires='>=' + config['min_python'],
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[name, f'{name}.*']),
    package_data={name: ['templates/*', 'results/*.json', 'vendor/*/*', 'py.typed']},
    install_requires=items('requirements'),
    extras_require={key.removesuffix('_requirements'): items(key) for key in extras},
    entry_points={
        'console_scripts': items('console_scripts'),
        'nbdev': [f'{name}={name}._modidx:d'],
    },
)
