"""The caller's side of a channel: proxies, calls with their deadlines, answers of many peers."""
