"""What GMC, DGC and gmc_hook are made of. Private: import gmc_cuda instead.

round      one step of all buckets: send, receive, apply, cancel
steps      a bucket's step as a generator, one for each way of exchanging: sparse, dense
missing    parameters without a gradient, which a step leaves alone
rules      what distinguishes GMC from DGC, and the plan of a bucket's step
packing    the buckets of an optimizer, kept in line with its param_groups and state
overlap    buckets sent during the backward pass: hooks, order, no_sync
bucket     parameters that share one flat index space, with their memory and momentum
budget     how many entries a step sends, and whether a dense all-reduce is cheaper
exchange   the collectives of a process group
shards     parameters that are sharded inside a node
state      an optimizer's state by parameter: saved, loaded, copied
checks     what users hand over: options, param groups, parameters, gradients
agreement  whether all workers have the same model and options
watch      damaged payloads, workers that all send the same, replicas that differ
wrapper    an optimizer around another one
library    the compiled operators
"""
