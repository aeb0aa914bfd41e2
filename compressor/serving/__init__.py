"""Memories served by vLLM: its KV connector, the shelf they lie on, the front that takes requests (docs/serving.md)."""

CONNECTOR = "CompressedMemories"


def register() -> None:
    """Make the connector known by name: vLLM calls this in each process (entry point `vllm.general_plugins`)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # optional

    if CONNECTOR not in KVConnectorFactory._registry:  # plugins may be loaded twice in a process
        KVConnectorFactory.register_connector(CONNECTOR, "compressor.serving.connector", CONNECTOR)
