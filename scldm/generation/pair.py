"""Whether a VAE and a flow belong together, from what their small files say: without torch."""

from __future__ import annotations

from scldm.data.vocabulary import Vocabulary


def pair_problems(
    *, vae_latents: tuple[int, int], flow_latents: tuple[int, int], vae: Vocabulary, flow: Vocabulary
) -> list[str]:
    """Return why a VAE and a flow do not belong together.

    Args:
        vae_latents: (m, e) of the VAE: latent tokens and their width.
        flow_latents: (m, e) that the flow takes.
        vae: Vocabulary that the VAE was trained with.
        flow: Vocabulary that the flow was trained with.
    """
    problems = []
    if vae_latents != flow_latents:
        problems.append(f"the VAE's latents are {vae_latents}, the flow's {flow_latents}")
    if vae.digest != flow.digest:
        problems.append("the VAE and the flow were trained with different vocabularies")
    return problems
