package nfs4

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engines/nfs"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

func TestWhatTheKernelIsTold(t *testing.T) {
	x := nfs.Export{Server: "nas", Path: "/e", Options: []string{"nconnect=2", "sec=krb5p"}}
	for _, m := range []struct {
		class []string
		want  string
	}{
		{nil, "vers=4.2,proto=tcp,addr=10.0.0.1,hard,port=2049,nconnect=2,sec=krb5p,lookupcache=none"},
		{[]string{}, "vers=4.2,proto=tcp,addr=10.0.0.1,hard,port=2049,nconnect=2,sec=krb5p"},
		{[]string{"noac", "sec=krb5"}, "vers=4.2,proto=tcp,addr=10.0.0.1,hard,port=2049,nconnect=2,noac,sec=krb5"},
	} {
		if have := strings.Join(mountOptions(x, "4.2", netip.MustParseAddr("10.0.0.1"), m.class), ","); have != m.want {
			t.Errorf("%v: %s\nwant %s", m.class, have, m.want)
		}
	}
}

// TestTheVersionIsFoundOnce: 4.2 where the server has it, else 4.1, and no other after that.
func TestTheVersionIsFoundOnce(t *testing.T) {
	old := fault.New(fault.Unsupported, "the server does not have this version")
	var asked []string
	serverWith := func(have string) func(string) error {
		return func(v string) error {
			asked = append(asked, v)
			if v != have {
				return old
			}
			return nil
		}
	}
	m, err := parseMinor("")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.mount(serverWith("4.0")); !errors.Is(err, fault.Unsupported) || !strings.Contains(err.Error(), "NFS 4.2 and 4.1") {
		t.Error(err)
	}
	away := fault.New(fault.Unavailable, "away")
	if err := m.mount(func(string) error { return away }); !errors.Is(err, fault.Unavailable) {
		t.Error(err)
	}
	asked = nil
	for range 2 {
		if err := m.mount(serverWith("4.1")); err != nil {
			t.Error(err)
		}
	}
	if want := []string{"4.2", "4.1", "4.1"}; !slices.Equal(asked, want) {
		t.Errorf("asked for %v, want %v", asked, want)
	}
	if m, err = parseMinor("4.1"); err != nil {
		t.Fatal(err)
	}
	if err := m.mount(serverWith("4.2")); !errors.Is(err, fault.Unsupported) || strings.Contains(err.Error(), "4.2") {
		t.Error(err)
	}
}

func TestParametersAreChecked(t *testing.T) {
	good := map[string]string{"server": "nas", "export": "/e"}
	for _, bad := range []struct{ param, value, says string }{
		{"server", "", `"server" is missing`},
		{"version", "3", "NFS 3 is the engine nfs3"},
		{"version", "4.0", "has no sessions"},
		{"version", "4", "has no sessions"},
		{"version", "5", `"4.1" and "4.2" are known`},
		{"sec", "none", "sys, krb5, krb5i and krb5p are known"},
		{"sec", "sys|krb5", "sys, krb5, krb5i and krb5p are known"},
		{"options", "sec=krb5", `it is the parameter "sec"`},
		{"options", "mountport=1", "no second protocol"},
		{"options", "soft", "would be lost"},
		{"options", "vers=4.1", `it is the parameter "version"`},
		{"options", "vers=3", `it is the parameter "version"`},
		{"mode", "0777", `"mode" is unknown: engine nfs4 knows export, folder, options, sec, server, version`},
	} {
		params := map[string]string{bad.param: bad.value}
		for name, value := range good {
			if name != bad.param {
				params[name] = value
			}
		}
		_, err := Open(t.Context(), params, host.NewLocal(host.Exec{}), t.TempDir())
		if err == nil || fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%s %q: error %v, want an invalid one that says %q", bad.param, bad.value, err, bad.says)
		}
	}
	for name, help := range Params() {
		if help == "" || strings.Contains(help, "\n") {
			t.Errorf("parameter %q: help %q is not one line", name, help)
		}
	}
}
