"""The project's own settings of Prefect: what a closed network needs, and what makes runs survive their worker and their server.

One table for all: the profile of the local stack (`rlhf up`), the temporary server of `rlhf run`, and the environment file of the
production form, which a test compares with it. No Prefect is imported here: it reads its settings when it is imported.
"""

HEARTBEAT_SECONDS = 30  # Prefect's least

OFFLINE = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # it asks a service elsewhere for its settings
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
}

LASTING = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
    "PREFECT_WORKER_QUERY_SECONDS": "5",
    # kept in files: limits that somebody sets by tag must not forget who holds them when the server is started again
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}


def profile(api: str) -> str:
    """The text of a profiles.toml whose one profile has these settings and the API's URL."""
    lines = [f'{name} = "{value}"' for name, value in {"PREFECT_API_URL": api, **OFFLINE, **LASTING}.items()]
    return 'active = "rlhf"\n\n[profiles.rlhf]\n' + "\n".join(lines) + "\n"
