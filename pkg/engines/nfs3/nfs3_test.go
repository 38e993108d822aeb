package nfs3

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engines/nfs"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/host"
)

// TestTheOwnMountTrustsNoCacheAndATreesMountLocksAtTheServer: what the kernel is told, word for word.
func TestTheOwnMountTrustsNoCacheAndATreesMountLocksAtTheServer(t *testing.T) {
	x, err := nfs.Parse("nfs3", Params(), map[string]string{"server": "nas", "export": "/e", "options": "nconnect=2,sec=sys,mountport=20048"}, own())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []struct {
		server string
		class  []string
		want   string
	}{
		{"10.0.0.1", nil, "vers=3,proto=tcp,addr=10.0.0.1,hard,port=2049,nconnect=2,sec=sys,mountport=20048,mountproto=tcp,nolock,lookupcache=none"},
		{"10.0.0.1", []string{}, "vers=3,proto=tcp,addr=10.0.0.1,hard,port=2049,nconnect=2,sec=sys,mountport=20048,mountproto=tcp"},
		{"fd00::1", []string{"sec=krb5", "actimeo=5"}, "vers=3,proto=tcp6,addr=fd00::1,hard,port=2049,nconnect=2,mountport=20048,sec=krb5,actimeo=5,mountproto=tcp6"},
	} {
		if have := strings.Join(mountOptions(x, netip.MustParseAddr(m.server), m.class), ","); have != m.want {
			t.Errorf("%v: %s\nwant %s", m.class, have, m.want)
		}
	}
}

func TestParametersAreChecked(t *testing.T) {
	for _, bad := range []struct {
		params map[string]string
		says   string
	}{
		{map[string]string{}, `"server" is missing`},
		{map[string]string{"server": "nas", "export": "/e", "version": "3"}, `"version" is unknown: engine nfs3 knows export, folder, options, server`},
		{map[string]string{"server": "nas", "export": "/e", "options": "vers=4"}, "the engine's type is its version"},
		{map[string]string{"server": "nas", "export": "/e", "options": "nolock"}, "two nodes could have the same one"},
		{map[string]string{"server": "nas", "export": "/e", "options": "sec=none"}, `"sec": its value has to match`},
	} {
		_, err := Open(t.Context(), bad.params, host.NewLocal(host.Exec{}), t.TempDir())
		if err == nil || fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%v: error %v, want an invalid one that says %q", bad.params, err, bad.says)
		}
	}
	for name, help := range Params() {
		if help == "" || strings.Contains(help, "\n") {
			t.Errorf("parameter %q: help %q is not one line", name, help)
		}
	}
	if err := nfs.CheckClass([]string{"lock", "sec=krb5p", "rsize=65536"}, own()); err != nil {
		t.Error(err)
	}
	for _, o := range []string{"nolock", "local_lock=all", "soft", "mountport=1", "nconnect=2"} {
		if err := nfs.CheckClass([]string{o}, own()); fault.KindOf(err) != fault.Invalid {
			t.Errorf("class option %s: %v", o, err)
		}
	}
	if !slices.Contains(strings.Split(strings.ReplaceAll(Params()["options"], ",", ""), " "), "mountport") {
		t.Error(Params()["options"])
	}
}
