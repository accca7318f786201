"""Training methods by name, as `config.method.name` selects them. One paper, one file."""

from collections.abc import Mapping
from typing import Any

from vpae_jax.config import build, nearest
from vpae_jax.methods.add import ADD
from vpae_jax.methods.apt import APT
from vpae_jax.methods.asd import ASD
from vpae_jax.methods.autoencoder import Autoencoder
from vpae_jax.methods.base import Method
from vpae_jax.methods.causal_init import CausalInit, CausalODE
from vpae_jax.methods.contrastive import Contrastive
from vpae_jax.methods.dcm import DCMDetail, DCMSemantic
from vpae_jax.methods.decoder import Decoder
from vpae_jax.methods.dmd2 import DMD2
from vpae_jax.methods.flow_matching import FlowMatching
from vpae_jax.methods.kd import KnowledgeDistillation
from vpae_jax.methods.lcm import LCM
from vpae_jax.methods.magic import Magic
from vpae_jax.methods.pcm import PCM
from vpae_jax.methods.self_forcing import SelfForcing
from vpae_jax.methods.vpae import PhaseOne, PhaseTwo
from vpae_jax.types import UserError

METHODS: Mapping[str, type] = {
    "add": ADD,
    "apt": APT,
    "asd": ASD,
    "autoencoder": Autoencoder,
    "causal_init": CausalInit,
    "causal_ode": CausalODE,
    "contrastive": Contrastive,
    "dmd2": DMD2,
    "dcm_detail": DCMDetail,
    "dcm_semantic": DCMSemantic,
    "decoder": Decoder,
    "flow_matching": FlowMatching,
    "kd": KnowledgeDistillation,
    "lcm": LCM,
    "magic": Magic,
    "pcm": PCM,
    "self_forcing": SelfForcing,
    "vpae_phase1": PhaseOne,
    "vpae_phase2": PhaseTwo,
}


def make_method(options: Mapping[str, Any]) -> Method:
    """The method that `options["name"]` names, with the other options as its fields.

    Raises:
      UserError: for an unknown method, or an option that it does not have.
    """
    name = options.get("name", "")
    if name not in METHODS:
        raise UserError(f"config.method.name: {name!r} does not exist{nearest(name, METHODS)}")
    return build(METHODS[name], {k: v for k, v in options.items() if k != "name"}, "config.method")
