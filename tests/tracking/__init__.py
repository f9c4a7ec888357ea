import os

# before anything imports mlflow, here and in the processes that tests start: servers that are down here stay so
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
