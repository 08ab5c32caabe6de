"""Call a model for its hidden states or logits, with PEFT's virtual tokens where it has them.

Prompt tuning puts trained embeddings before the sequence, prefix tuning trained keys and values before those
of every attention layer. PEFT does so in the `forward` of its model; for hidden states without logits it is
done here, from the same `get_prompt`. The results are for the given tokens only, without the virtual ones.

Shapes: B = sequences, T = tokens, P = virtual tokens, H = hidden size, V = vocabulary.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["hidden_states", "logits", "max_positions", "num_virtual_tokens", "unwrap_adapters"]


def num_virtual_tokens(model: Any) -> int:
    """Return P, the number of positions that PEFT's virtual tokens take; 0 for any other model."""
    config = _prompt_config(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def max_positions(model: nn.Module) -> int | None:
    """Return how many tokens fit in a sequence beside virtual tokens; None if the config has no limit."""
    config: Any = model.config
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else limit - num_virtual_tokens(model)


def unwrap_adapters(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's, with the adapters that are in it; any other as it is."""
    find: Any = getattr(model, "get_base_model", None)  # a model with adapters put inside has none
    inside: nn.Module = model if find is None else find()
    return inside


def hidden_states(model: Any, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Return the decoder's output for the tokens, [B, T, H]: the input of the head."""
    decoder, config = model.get_decoder(), _prompt_config(model)
    inputs: dict[str, Any] = {"input_ids": input_ids_BT}
    if config is not None:
        inputs, position_ids_BT = _with_prompt(model, config, input_ids_BT, position_ids_BT)
    out = decoder(**inputs, use_cache=False, **_positions(decoder, position_ids_BT))
    hidden_BTH: Tensor = out.last_hidden_state
    return hidden_BTH[:, -input_ids_BT.shape[1] :]


def logits(model: Any, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """Return the logits of the model's own `forward`, [B, T, V]. PEFT's counts positions by itself."""
    # PEFT's own forward passes on what it is given, and names none of it.
    takes_them = _prompt_config(model) is None
    positions = _positions(unwrap_adapters(model), position_ids_BT) if takes_them else {}
    logits_BTV: Tensor = model(input_ids=input_ids_BT, use_cache=False, **positions).logits
    return logits_BTV[:, -input_ids_BT.shape[1] :]


def _with_prompt(
    model: Any, config: Any, input_ids_BT: Tensor, position_ids_BT: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """The decoder's inputs and positions with the virtual tokens before each sequence."""
    batch_size, num_virtual = len(input_ids_BT), config.num_virtual_tokens
    positions_BT = position_ids_BT + num_virtual
    prompt = model.get_prompt(batch_size)
    if not isinstance(prompt, Tensor):  # keys and values of all layers
        return {"input_ids": input_ids_BT, "past_key_values": prompt}, positions_BT
    embedded_BTH = model.get_input_embeddings()(input_ids_BT)
    first_BP = torch.arange(num_virtual, device=positions_BT.device).expand(batch_size, -1)
    inputs = {"inputs_embeds": torch.cat([prompt.to(embedded_BTH.dtype), embedded_BTH], dim=1)}
    return inputs, torch.cat([first_BP, positions_BT], dim=1)


def _prompt_config(model: Any) -> Any:
    """Return PEFT's config if it adds virtual tokens, else None."""
    configs = getattr(model, "peft_config", None)  # PEFT's own model, not one with adapters put inside
    config = getattr(model, "active_peft_config", None) if isinstance(configs, dict) else None
    return config if config is not None and config.is_prompt_learning else None


def _positions(module: nn.Module, position_ids_BT: Tensor) -> dict[str, Tensor]:
    """Return position_ids as an argument, or nothing for attention that counts positions itself (ALiBi)."""
    takes_them = "position_ids" in inspect.signature(module.forward).parameters
    return {"position_ids": position_ids_BT} if takes_them else {}
