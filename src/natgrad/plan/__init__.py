"""What a run will cost before anyone rents the machines: time, memory and messages, by the code that would run.

trace     a network on the meta device: what each layer sees, and every operation between layers
ghost     the real optimizer on ranks that are not there: its owners, its state, its messages
stages    work and messages as seconds on a machine
"""
