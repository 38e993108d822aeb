package image

import "strings"

// Canonical is a handle under its domain's present name, so that two handles
// of one image are equal. A handle of a domain that is not open stays as it is.
func (m *Manager) Canonical(h Handle) Handle { return m.canonical(h) }

// canonicalKey is an operation's key with the handle in it under its domain's
// present name. A key is "<verb>/<handle>" with or without more behind it, or
// "<space>/<name>", where the name may look like anything.
func (m *Manager) canonicalKey(key string) string {
	verb, rest, _ := strings.Cut(key, "/")
	switch verb {
	case spaceVolume, spaceSnapshot, spaceGroup:
		return key
	}
	domain, image, ok := strings.Cut(rest, "/")
	if !ok {
		return key
	}
	return verb + "/" + m.canonical(Handle{Domain: domain}).Domain + "/" + image
}
