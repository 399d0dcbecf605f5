"""What a run will cost before anyone rents the machines: time, memory and messages, by the code that would run.

trace     a network on the meta device: what each layer sees, and every operation between layers
rehearsal the real optimizer takes its steps on ranks that are not there: its owners, messages and operations
stages    work, operations and messages as seconds on a machine
remedies  what holds a step on many ranks, and what would shorten it
"""
