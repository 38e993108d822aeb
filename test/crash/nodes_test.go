package crash_test

func (nodes) Nodes() []string { return []string{"n1"} }
