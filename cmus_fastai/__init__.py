"Kidney biopsies in three modalities: CMUS-Net (Long et al. 2025, arXiv 2512.15171) for fastai"
import warnings

__version__ = "0.2.0"

# libraries that this package imports still call torch.jit.script; users can do nothing about it
warnings.filterwarnings('ignore', message='.torch.jit.script. is deprecated', category=FutureWarning)
warnings.filterwarnings('ignore', message='.torch.jit.script. is deprecated', category=DeprecationWarning)
