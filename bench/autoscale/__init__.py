"""What the autoscaler of k8s/ does under load, simulated request by request.

    python -m bench.autoscale [--out FOLDER]

`pod.py` is a server as docs/results.md measured it, `prometheus.py` what is known of it and when,
`hpa.py` Kubernetes' arithmetic with the numbers of the manifest, `cluster.py` puts them together,
`traces.py` has the load, `figures.py` draws. Clients do not wait for answers and do not try again;
each request goes to a random pod that is ready, as from a load balancer that looks at requests.
"""
