"""`finetune-nb art-server`: the wire protocol of OpenPipe's `art run` (0.5.17) over the local backend."""
