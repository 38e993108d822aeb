package smb

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

func volumeOf(t *testing.T, change func(params, secrets map[string]string)) *volume {
	t.Helper()
	params, secrets := good()
	if change != nil {
		change(params, secrets)
	}
	s, err := check(params, secrets)
	if err != nil {
		t.Fatal(err)
	}
	return &volume{settings: s, local: host.NewLocal(nil)}
}

func address() netip.AddrPort { return netip.MustParseAddrPort("192.0.2.1:445") }

func TestTheDomainsMountHidesNothingFromOtherHosts(t *testing.T) {
	data := volumeOf(t, nil).data(address(), nil)
	for _, o := range []string{"ip=192.0.2.1", "port=445", "hard", "serverino", "cache=strict", "nolease", "actimeo=0", "nohandlecache", "nobrl", "sec=ntlmssp"} {
		if !slices.Contains(data, o) {
			t.Errorf("option %s is missing", o)
		}
	}
	for _, o := range data {
		if strings.HasPrefix(o, "vers=") || strings.HasPrefix(o, "domain=") {
			t.Errorf("option %s is there, and nobody has asked for it", o)
		}
	}
}

func TestAClassHasTheLastWord(t *testing.T) {
	v := volumeOf(t, func(params, secrets map[string]string) {
		params["options"], params["version"], secrets["domain"] = "seal,echo_interval=30", "3.0.2", "LAB"
	})
	data := v.data(address(), []string{"uid=1000", "cache=none"})
	for _, o := range []string{"seal", "vers=3.0.2", "domain=LAB"} {
		if !slices.Contains(data, o) {
			t.Errorf("option %s is missing", o)
		}
	}
	if slices.Contains(data, "nobrl") {
		t.Error("locks of a directory volume's users stay on one node")
	}
	for _, order := range [][2]string{{"uid=0", "uid=1000"}, {"cache=strict", "cache=none"}, {"echo_interval=15", "echo_interval=30"}} {
		if a, b := slices.Index(data, order[0]), slices.Index(data, order[1]); a < 0 || b < a {
			t.Errorf("%s at %d does not come before %s at %d, which counts", order[0], a, order[1], b)
		}
	}
}

// The kernel separates options by commas and takes two for one that belongs to a value: see
// smb3_fs_context_parse_monolithic.
func TestCommasInSecretsAreDoubled(t *testing.T) {
	data := volumeOf(t, func(_, secrets map[string]string) {
		secrets["password"], secrets["username"] = `,a,,b="c,`, "quarry, of nas"
	}).data(address(), nil)
	for _, o := range []string{`password=,,a,,,,b="c,,`, "username=quarry,, of nas"} {
		if !slices.Contains(data, o) {
			t.Errorf("option %s is missing", o)
		}
	}
}

func TestTheSourceNamesTheFolder(t *testing.T) {
	v := volumeOf(t, func(params, _ map[string]string) { params["server"] = "[fd00::1]:4450" })
	if got := v.source(""); got != "//fd00::1/k8s" {
		t.Errorf("the share is %s", got)
	}
	if got := v.source("prod/slabs/_a_/data"); got != "//fd00::1/k8s/prod/slabs/_a_/data" {
		t.Errorf("the folder is %s", got)
	}
}

func TestAFailedMountIsExplained(t *testing.T) {
	v := volumeOf(t, nil)
	for _, c := range []struct {
		folder string
		errno  unix.Errno
		kind   fault.Kind
		says   string
	}{
		{"", unix.EACCES, fault.Permission, `refuses user "quarry"`},
		{"", unix.ENOENT, fault.Invalid, "//nas.example/k8s: the server has no such share"},
		{"prod", unix.ENOENT, fault.NotFound, "no such folder"},
		{"", unix.EKEYEXPIRED, fault.Permission, "has expired"},
		{"", unix.EOPNOTSUPP, fault.Invalid, "encryption"},
		{"", unix.EHOSTDOWN, fault.Unavailable, "host is down"},
	} {
		err := v.refused(c.folder, fault.New(fault.Unavailable, "mount: %w", c.errno))
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: the error is %v; it should be %v and say %q", c.errno, err, c.kind, c.says)
		}
	}
}

func TestNoFormatShowsThePassword(t *testing.T) {
	v := volumeOf(t, nil)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, v.settings); strings.Contains(s, hidden) {
			t.Errorf("%s shows the password: %s", verb, s)
		}
	}
}
