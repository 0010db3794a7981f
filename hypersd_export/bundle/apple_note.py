"""Resources/README.md of a bundle in Apple's layout: how to compile the packages, and which calls play the plan."""

from collections.abc import Mapping
from typing import Any

UNITS = {"all": "all", "cpu-only": "cpuOnly", "cpu-and-gpu": "cpuAndGPU", "cpu-and-ne": "cpuAndNeuralEngine"}
"""`MLComputeUnits` in Swift, by our names."""

_TEMPLATE = """\
# For Apple's runtime (the Swift package ml-stable-diffusion)

`StableDiffusionPipeline(resourcesAt:)` wants one folder with compiled models (`.mlmodelc`), `vocab.json` and
`merges.txt`. A Mac with Xcode compiles; on a device `MLModel.compileModel(at:)` does. Copy this folder to where the app
has its resources, as a bundle's own files are checked by their digests, and then:

```
for package in {packages}; do
  xcrun coremlcompiler compile "BUNDLE/$package" RESOURCES/
done
```

## The calls

Written from the package's sources and **not compiled here**:

```swift
let models = MLModelConfiguration()
models.computeUnits = .{units}
let pipeline = try StableDiffusionPipeline(
    resourcesAt: resources, controlNet: [], configuration: models, disableSafety: true)
var configuration = StableDiffusionPipeline.Configuration(prompt: prompt)
configuration.schedulerType = .dpmSolverMultistepScheduler
configuration.schedulerTimestepSpacing = .linspace
configuration.stepCount = {steps}
configuration.guidanceScale = {guidance}
configuration.encoderScaleFactor = {scale}
configuration.decoderScaleFactor = {scale}{shift}
let images = try pipeline.generateImages(configuration: configuration)
```

{guidance_note}

| stepCount | what is played |
|---|---|
{plays}

## What differs from this project's own runtime

- The noise is that of the app's random source (`configuration.rngType`), not of `golden/`.
- Apple's tokenizer splits at spaces only: a comma or a full stop behind a word gives other tokens; put a space before.
{pad}{encoder}"""

_ONE_ROW = "The UNet takes one row: with a `guidanceScale` of 1 or more it would be called twice a step, for nothing."
_TWO_ROWS = "The UNet takes both rows of guidance in one call."
_PAD = "- It pads with `<|endoftext|>`, where this model's pad token is `{pad}`.\n"
_ENCODER = "- Image to image does not work there: its encoder wants 4 latent channels, and this VAE has {channels}.\n"


def resources_note(facts: Mapping[str, Any]) -> str:
    """The text. `facts`: packages (their paths in the bundle), units (ours), guidance (its scale, 1 for none), scale,
    shift, plays (steps → None if exact, else dB), pad (the tokenizer's pad token), channels (of the latents)."""
    guided = facts["guidance"] > 1.0
    pad, channels = facts["pad"], facts["channels"]
    return _TEMPLATE.format(
        packages=" ".join(facts["packages"]),
        units=UNITS[facts["units"]],
        steps=next(iter(facts["plays"])),
        guidance=f"{facts['guidance']:g}" if guided else "0",
        scale=f"{facts['scale']:g}",
        shift=f"\nconfiguration.decoderShiftFactor = {facts['shift']:g}" if facts["shift"] else "",
        guidance_note=_TWO_ROWS if guided else _ONE_ROW,
        plays="\n".join(f"| {steps} | {_played(db)} |" for steps, db in facts["plays"].items()),
        pad="" if pad == "<|endoftext|>" else _PAD.format(pad=pad),
        encoder="" if channels == 4 else _ENCODER.format(channels=channels),
    )


def _played(db: float | None) -> str:
    if db is None:
        return "this bundle's plan, exactly"
    return f"near this bundle's plan: the picture is {db:.1f} dB from it"
