package nfs

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// known is what the engine in these tests takes.
func known() map[string]string { return Params() }

// TestAnExportThatCannotBeIsRefusedByName: field, value and what is allowed, before anybody is asked.
func TestAnExportThatCannotBeIsRefusedByName(t *testing.T) {
	for _, bad := range []struct{ param, value, says string }{
		{"server", "", `parameter "server" is missing`},
		{"server", "nas:/export", `its path into "export"`},
		{"server", "nas:2049", `port=N`},
		{"server", "[fd00::1]", "without brackets"},
		{"server", "na s", "neither a host's name nor an address"},
		{"server", "-nas", "neither a host's name nor an address"},
		{"server", strings.Repeat("a", 254), "neither a host's name nor an address"},
		{"export", "", `parameter "export" is missing`},
		{"export", "export/k8s", "an absolute path is needed"},
		{"export", "/export/", `write it as "/export"`},
		{"export", "/export/../etc", `write it as "/etc"`},
		{"export", "/a\nb", "control character"},
		{"export", "/" + strings.Repeat("a", 512), "at most 512"},
		{"folder", "..", `without ".."`},
		{"folder", "a/../../b", `without ".."`},
		{"folder", "a//b", "a folder in the share is needed"},
		{"folder", "a\nb", "a folder in the share is needed"},
		{"path", "/srv", `parameter "path" is unknown: engine nfs knows export, folder, options, server`},
		{"options", "soft", `parameter "options": mount option "soft" is refused: what was written would be lost`},
		{"options", "rsize=1048576,,hard", `mount option "" is unknown`},
	} {
		params := map[string]string{"server": "nas", "export": "/export"}
		params[bad.param] = bad.value
		_, err := Parse("nfs", known(), params, Options{})
		if err == nil || fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%s %q: error %v, want an invalid one that says %q", bad.param, bad.value, err, bad.says)
		}
	}
}

func TestWhatIsMounted(t *testing.T) {
	for _, good := range []struct{ server, export, folder, below, source string }{
		{"nas", "/export", "", "", "nas:/export"},
		{"nas.example.com", "/", "", "k8s", "nas.example.com:/k8s"},
		{"10.0.0.1", "/export", "k8s/prod", "k8s/prod", "10.0.0.1:/export/k8s/prod"},
		{"fd00::1", "/a b,c", "", "slabs/x/data", "[fd00::1]:/a b,c/slabs/x/data"},
	} {
		x, err := Parse("nfs", known(), map[string]string{"server": good.server, "export": good.export, "folder": good.folder}, Options{})
		if err != nil || x.Source(good.below) != good.source {
			t.Errorf("%+v: %q, %v", good, x.Source(good.below), err)
		}
	}
}

// TestOnePlace: the same folder of the same export is one, however it is written.
func TestOnePlace(t *testing.T) {
	place := func(server, export, folder string) string {
		return Place(map[string]string{"server": server, "export": export, "folder": folder})
	}
	for _, same := range []string{place("NAS", "/export", "k8s"), place("nas.", "/export/k8s", ""), place("nas", "/export", "/k8s/")} {
		if want := "nfs://nas/export/k8s"; same != want {
			t.Errorf("%s, want %s", same, want)
		}
	}
	if place("nas", "/export", "") == place("nas", "/export", "k8s") {
		t.Error("two folders are one place")
	}
}

// TestAClassTakesThePlaceOfTheDomainsOption: also of sec, of which the kernel would try both.
func TestAClassTakesThePlaceOfTheDomainsOption(t *testing.T) {
	x := Export{Server: "nas", Path: "/", Options: []string{"sec=krb5p", "rsize=65536", "nconnect=4"}}
	have := x.MountOptions(netip.MustParseAddr("10.0.0.1"), []string{"sec=sys", "actimeo=1"})
	want := []string{"proto=tcp", "addr=10.0.0.1", "hard", "port=2049", "rsize=65536", "nconnect=4", "sec=sys", "actimeo=1"}
	if !slices.Equal(have, want) {
		t.Errorf("%q, want %q", have, want)
	}
	x.Options = []string{"port=20490"}
	have = x.MountOptions(netip.MustParseAddr("fd00::1"), nil)
	want = []string{"proto=tcp6", "addr=fd00::1", "hard", "port=20490"}
	if !slices.Equal(have, want) || x.Port() != 20490 {
		t.Errorf("%q at port %d, want %q", have, x.Port(), want)
	}
}

// TestEveryOptionHasItsPlace: what a domain has is told to a class, and the reverse; nothing is allowed and refused.
func TestEveryOptionHasItsPlace(t *testing.T) {
	says := func(err error, words string) {
		t.Helper()
		if err == nil || fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), words) {
			t.Errorf("error %v, want one that says %q", err, words)
		}
	}
	says(checkDomainOptions([]string{"actimeo=0"}, Options{}), "the domain's own mount has to see at once")
	says(CheckClass([]string{"nconnect=4"}, Options{}), `the domain's parameter "options"`)
	says(checkDomainOptions([]string{"rsize=12"}, Options{}), `"rsize": its value has to match`)
	says(checkDomainOptions([]string{"port=65536"}, Options{}), `"port": its value has to match`)
	says(checkDomainOptions([]string{"port=0"}, Options{}), `"port": its value has to match`)
	says(CheckClass([]string{"noatime=1"}, Options{}), "takes no value")
	says(CheckClass([]string{"exec"}, Options{}), `"exec" is unknown or not allowed`)
	for name, why := range dangerous() {
		says(CheckClass([]string{name + "=1"}, Options{}), why)
		says(checkDomainOptions([]string{name}, Options{}), why)
	}
	for _, allowed := range []map[string]string{connection(), caching()} {
		for name := range maps.Keys(allowed) {
			if why, both := dangerous()[name]; both {
				t.Errorf("option %q is allowed, and refused: %s", name, why)
			}
		}
	}
	for _, good := range []string{"port=1", "port=65535", "port=2049", "nconnect=16", "rsize=1048576", "timeo=600", "retrans=0", "hard"} {
		if err := checkDomainOptions([]string{good}, Options{}); err != nil {
			t.Error(err)
		}
	}
	if err := CheckClass([]string{"actimeo=0", "noac", "lookupcache=positive", "sync", "wsize=65536"}, Options{}); err != nil {
		t.Error(err)
	}
}
