"""The diffusers pipeline's prompts: read once for several calls, or by the call itself."""

from typing import Any

from model.common.errors import UserError
from model.condition import Text
from pipeline.inference.call import check_embeds, list_negatives, list_prompts


class PromptEncoding:
    """The part of a diffusers pipeline that reads prompts."""

    text: Any
    num_frames: int

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: list[Text] | None = None,
        negative_prompt_embeds: list[Text] | None = None,
    ) -> tuple[list[Text], list[Text]]:
        """Read the prompts, once for several calls.

        Args:
            prompt: one or several.
            negative_prompt: to steer away from: one for all prompts or one each; None or empty = the null
                caption of training.
            prompt_embeds: prompts that are read already, instead of `prompt`.
            negative_prompt_embeds: negative prompts that are read already, instead of `negative_prompt`.

        Returns:
            Prompts and negative prompts as a call takes them for `prompt_embeds` and
            `negative_prompt_embeds`: one `Text` per LLM.

        Raises:
            UserError: if both forms of a prompt are given, or their numbers do not fit.
        """
        for name, given, embeds in (
            ("prompt", prompt, prompt_embeds),
            ("negative_prompt", negative_prompt, negative_prompt_embeds),
        ):
            if given is not None and embeds is not None:
                raise UserError(f"{name}= beside {name}_embeds=: give one of them")
        known = check_embeds("prompt_embeds", prompt_embeds)
        texts = [] if known else list_prompts(prompt)
        count = len(known[0].mask) if known else len(texts)
        known_negatives = check_embeds("negative_prompt_embeds", negative_prompt_embeds, count)
        negatives = [] if known_negatives else list_negatives(negative_prompt, count)

        read, read_negatives = self._read(texts, negatives)
        prompt_embeds, negative_prompt_embeds = known or read, known_negatives or read_negatives
        return prompt_embeds, negative_prompt_embeds

    def _read(self, *batches: list[str]) -> list[list[Text]]:
        if not any(batches):
            return [[] for _ in batches]
        if self.text is None:
            raise UserError(
                "the pipeline has no text part: give prompt_embeds= and negative_prompt_embeds=, or load it "
                "with the part"
            )
        # where a part waits on another device to save memory, no LLM should stay on the device either
        # The pipeline's, of diffusers' base class.
        device = self._execution_device  # pyright: ignore[reportAttributeAccessIssue]
        return self.text(*batches, keep_llms=self.text.device == device, frames=self.num_frames)
