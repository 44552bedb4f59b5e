"""Commands of the runtime: wsss-predict and wsss-doctor."""
