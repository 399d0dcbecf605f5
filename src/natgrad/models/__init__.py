"""Networks as plain torch modules, each described by a small frozen dataclass."""

from natgrad.models.base import Architecture
from natgrad.models.imagenet import ImageResNet
from natgrad.models.mlp import Mlp
from natgrad.models.preactivation import PreActResNet
from natgrad.models.resnet import CifarResNet
from natgrad.models.transformer import Transformer
from natgrad.models.user import UserModel
from natgrad.models.vgg import Vgg16

__all__ = ["Architecture", "CifarResNet", "ImageResNet", "Mlp", "PreActResNet", "Transformer", "UserModel", "Vgg16"]
