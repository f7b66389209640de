"""What a method does to training: its loss, and its time over slow links.

convergence         held-out loss at equal bytes, each method at its best
network             a training step over links of 10 Mbit/s to 10 Gbit/s
time_to_loss        seconds to a held-out loss over such links
local_updates       outer optimizers for local updates
scaling             the fastest method by a model of a step, 2 to 1024 workers
overlap_trace       a picture of overlap=True

logical_workers     p workers in one process, for convergence
logical_methods     what those workers exchange: a row for each method
ladder              the search for a method's momentum and learning rate
convergence_report  its lines, table and picture
namespaces          workers in network namespaces whose links are limited to a rate
network_models      the models whose steps are measured
network_methods     what is compared over such links
network_worker      one worker of network
training_worker     one worker of time_to_loss
step_model          the model of a training step
measured_steps      that model against network's measurements
"""
