import copy

import torch

import tiny
from lisatune.losses.causal_lm import CausalLMLoss
from lisatune.methods import MeZO
from lisatune.nn.layers import find_layers
from lisatune.recipe import OptimizerConfig
from reference.mezo_reference import train_reference


def test_weights_are_those_of_the_algorithm_with_everything_in_memory() -> None:
    model = tiny.llama(tied=True, blocks=3)
    twin = copy.deepcopy(model)
    ids = [tiny.tokens(step) for step in range(5)]
    batches = [
        {"input_ids": each, "labels": each, "position_ids": torch.arange(each.shape[1]).expand_as(each)}
        for each in ids
    ]
    method = MeZO(seed=3, epsilon=1e-2)
    optimizer = method.build_optimizer(model, find_layers(model), OptimizerConfig(lr=1e-3, weight_decay=0.5))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = {p: name for name, p in model.named_parameters()}
    assert {named[p] for p in decays if not decays[p]} == {
        name for name in named.values() if "proj" not in name
    }
    device = torch.device("cpu")
    step = method.build_step(
        model, CausalLMLoss(model), optimizer, device=device, autocast=None, max_grad_norm=None
    )
    slopes = []
    for batch in batches:
        step.backward([batch])
        slopes.append(float(step.clip()))
        step.update()

    twins = dict(twin.named_parameters())
    of_twin = {twins[named[p]]: decay for p, decay in decays.items()}
    expected = train_reference(twin, batches, decays=of_twin, distance=1e-2, lr=1e-3, seed=3)
    assert slopes == [abs(slope) for slope in expected]
    tiny.assert_same_weights(model, twin)
