"""The benchmark: what the machine can do, and what part of it we use, measured in the same run.

`models` are the sizes, `work` counts the operations and bytes of a task (by `minimoe.schedule`), `limits` measures how
fast a device reads and multiplies, `workloads` are what is timed, `peers` and `theirs` are Hugging Face transformers on
the same weights and inputs, in a process of its own; `measure` lets all of them take turns, `profile` times every op,
`cold` is a fresh process with its `memory`. `plan` checks what is asked for, `run` does it and returns one JSON
document, which `report` turns into lines for a terminal and `tables` into a README's table.
"""
