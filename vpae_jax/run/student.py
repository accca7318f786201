"""Assembles a method's student from the weights of a run, for sampling, scoring and export."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from vpae_jax.inference.samplers import Denoiser
from vpae_jax.methods.base import Student
from vpae_jax.run.export import Trained
from vpae_jax.runtime.processes import to_host
from vpae_jax.train.roles import RoleModels
from vpae_jax.train.state import TrainState
from vpae_jax.types import Params
from vpae_jax.weights.lora import from_adapters

Weights = Mapping[str, Params]


@dataclass(frozen=True)
class Maker:
    """Assembles a student.

    Attributes:
      models: how weights become networks.
      student: the method's declaration of its student.
      frozen: weights that are not trained, by role.
    """

    models: RoleModels
    student: Student
    frozen: Weights

    @property
    def roles(self) -> tuple[str, ...]:
        """The trained roles that are part of the student."""
        views = [self.models.views[name] for name in self._views(averaged=False)]
        parts = [(view.role, self.models.roles[view.role].adapters) for view in views]
        found = [name for role, adapters in parts for name in (role, *([] if adapters is None else [adapters.on]))]
        return tuple(dict.fromkeys(name for name in found if self.models.roles[name].trains))

    def shown(self, state: TrainState) -> dict[str, Denoiser]:
        """Returns the student and, if there is one, its average, by name."""
        made = {"generator": self._denoiser(state.params, state.averages, averaged=False)}
        if self.student.average is not None:
            made["generator, average"] = self._denoiser(state.params, state.averages, averaged=True)
        return made

    def judged(self, state: TrainState) -> Denoiser:
        """Returns the network that is scored and exported: the average, if there is one."""
        return self._denoiser(state.params, state.averages, averaged=True)

    def of_start(self, params: Weights) -> Denoiser:
        """Returns the same for the weights that a run starts from, whose averages are equal to them."""
        return self._denoiser(params, self._averages(params), averaged=True)

    def exported(self, params: Weights, averages: Weights | None = None) -> tuple[Trained, Trained | None]:
        """Returns the transformer to export, or two experts, on the host. All processes must call this.

        Args:
          params: weights of the trained roles.
          averages: None if they are equal to the weights.
        """
        kept = self._averages(params) if averages is None else averages
        high, low = self._views(averaged=True)[0], self._views(averaged=True)[1:]
        return self._trained(high, params, kept), self._trained(low[0], params, kept) if low else None

    def _views(self, averaged: bool) -> list[str]:
        names = [self.student.view] if self.student.low is None else [self.student.view, self.student.low]
        return [averaged_view(self.models.views, self.student, name) for name in names] if averaged else names

    def _averages(self, params: Weights) -> dict[str, Params]:
        roles = self.models.roles
        return {f"{role}_{name}": tree for role, tree in params.items() for name in roles[role].averages}

    def _denoiser(self, params: Weights, averages: Weights, averaged: bool) -> Denoiser:
        held = {**self.frozen, **params}
        first, *low = (self.models.weights(name, held, averages) for name in self._views(averaged))
        return Denoiser(*first, low=low[0] if low else None, boundary=self.student.boundary)

    def _trained(self, name: str, params: Weights, averages: Weights) -> Trained:
        view = self.models.views[name]
        role = self.models.roles[view.role]
        held = {**self.frozen, **params}
        own = held[view.role] if view.average is None else averages[f"{view.role}_{view.average}"]
        if role.adapters is None:
            return Trained(to_host(own))
        lora = from_adapters(to_host(own), role.adapters.alpha * view.scale, role.adapters.rank)
        return Trained(to_host(held[role.adapters.on]), lora)


def averaged_view(views: Collection[str], student: Student, name: str) -> str:
    """Returns the view that is scored and exported for one of the student's views: its average, if there is one.

    Args:
      views: names of all views.
    """
    average = f"{name}_{student.average}"
    return average if student.average is not None and average in views else name
