"""What gmc_cuda is made of. Private: import gmc_cuda instead.

A step
  optimizer      the torch.optim face of the engine: what GMC and DGC share
  engine         makes an optimizer's steps, over buckets that match what users see
  round          one step of all buckets: send, receive, apply, cancel
  steps          one bucket's step as a generator, for each way of exchanging: sparse, dense
  two_sided      the step of two-sided compression, which sends twice
  rules          how GMC and DGC differ, and the plan of a bucket's step
  missing        parameters without a gradient, which a step leaves alone
  overlap        buckets sent during the backward pass: hooks, order, no_sync
  exchange       the collectives of a process group
  budget         how many entries a step sends, and whether a dense all-reduce is cheaper

State
  packing        the buckets of an optimizer, a cache of its param_groups and state
  bucket         parameters that share one flat index space, with their memory and momentum
  ranges         the ranges that a bucket is cut into for two-sided compression
  owner          the range that this worker owns, and its owner memory
  lazy_views     a_{t-1} and the owner memory as tensors in optimizer.state
  entry          an entry of optimizer.state, which notices writes to it
  state          memory and momentum by parameter: held, saved, loaded
  shards         parameters that are sharded inside a node

What can go wrong
  checks         what users pass: options, param groups, parameters, gradients
  device         what depends on the kind of device
  comparison     whether all workers have the same model and options
  watch          damaged payloads, workers that send the same, skipped steps, differing replicas
  fingerprint    numbers that differ where parameters differ
  ddp_guard      a DistributedDataParallel that averages the same gradients

Around other optimizers
  wrapper        an optimizer around another one: LocalUpdates, NodeAverage
  ddp_buckets    buckets as DistributedDataParallel cuts them, for gmc_hook
  scaling        the GradScaler beside a communication hook

Checkpoints
  snapshot       what a checkpoint holds of a model and an optimizer
  parts          the folder of a checkpoint, and whether its files are complete
  meeting        how workers wait for each other, and decide something, outside a step
  background     saves in a background thread
  format2        checkpoints of an older format
  names          parameter names without the prefixes of wrappers

  library        the compiled operators
"""
