"""Language models: their backbone and head, what wraps them, their attention, two small ones."""

from fastpref.models.head import HEAD_TOLERANCE as HEAD_TOLERANCE
from fastpref.models.head import Head as Head
from fastpref.models.head import backbone as backbone
from fastpref.models.head import compile_backbone as compile_backbone
from fastpref.models.head import hidden_and_head as hidden_and_head
from fastpref.models.head import hidden_states as hidden_states
from fastpref.models.head import output_head as output_head
from fastpref.models.head import read_head as read_head
from fastpref.models.layers import other_mixers as other_mixers
from fastpref.models.small import CHATML as CHATML
from fastpref.models.small import cache_folder as cache_folder
from fastpref.models.small import convert_gguf as convert_gguf
from fastpref.models.small import load as load
from fastpref.models.small import smollm2 as smollm2
from fastpref.models.small import tiny as tiny
from fastpref.models.wrappers import evaluating as evaluating
from fastpref.models.wrappers import has_parameters as has_parameters
from fastpref.models.wrappers import inner_model as inner_model
from fastpref.models.wrappers import is_peft as is_peft
from fastpref.models.wrappers import is_sharded as is_sharded
from fastpref.models.wrappers import reshard as reshard
from fastpref.models.wrappers import run_inside as run_inside
from fastpref.models.wrappers import sharded_like as sharded_like
from fastpref.models.wrappers import uncompiled as uncompiled
from fastpref.models.wrappers import unwrapped as unwrapped
from fastpref.models.wrappers import whole as whole
