"""Memories served by vLLM: its KV connector, the shelf they lie on, the front that takes requests (docs/serving.md).

vLLM finds the connector by the entry point `vllm.general_plugins`, or by its module (`kv_connector_module_path`).
"""

CONNECTOR = "CompressedMemories"


def register() -> None:
    """Make the connector known by name; vLLM calls this in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:  # plugins may be loaded twice in a process
        KVConnectorFactory.register_connector(CONNECTOR, "compressor.serving.connector", CONNECTOR)
