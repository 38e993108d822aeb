package smb

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/quarry-csi/quarry/pkg/fault"
)

// hidden is in no error, however it comes about.
const hidden = "dont,tell"

func good() (params, secrets map[string]string) {
	return map[string]string{"server": "nas.example", "share": "k8s"}, map[string]string{"username": "quarry", "password": hidden}
}

func TestParametersAreChecked(t *testing.T) {
	for _, c := range []struct {
		name, value string
		says        string // "": accepted
	}{
		{"server", "nas", ""},
		{"server", "nas.example.:4450", ""},
		{"server", "10.0.0.1:445", ""},
		{"server", "fd00::1", ""},
		{"server", "[fd00::1]", ""},
		{"server", "[fd00::1]:4450", ""},
		{"server", "", `"server"`},
		{"server", "//nas/k8s", `"//nas/k8s"`},
		{"server", "nas:0", `"nas:0"`},
		{"server", "nas:70000", `"nas:70000"`},
		{"server", "nas,ip=1.2.3.4", `"server"`},
		{"server", "fe80::1%eth0", `"server"`},
		{"share", "k8s", ""},
		{"share", "K8s data$", ""},
		{"share", "", `"share" is missing`},
		{"share", `\\nas\k8s`, "without the server"},
		{"share", "k8s/prod", `parameter "folder"`},
		{"share", "a,b", `"a,b"`},
		{"share", "a\nb", `"a\nb"`},
		{"share", strings.Repeat("s", 81), "80 bytes"},
		{"share", "ipc$", "holds no files"},
		{"folder", "prod", ""},
		{"folder", "k8s/prod, old", ""},
		{"folder", "/prod/", ""},
		{"folder", "a//b", "without"},
		{"folder", "../other", "without"},
		{"folder", `a\b`, "without"},
		{"folder", "a./b", "servers drop"},
		{"folder", "what?", `has one of`},
		{"folder", strings.Repeat("f", 256), "too long"},
		{"version", "2.1", ""},
		{"version", "3.0.2", ""},
		{"version", "1.0", "allowed are 2.1, 3.0, 3.0.2, 3.1.1"},
		{"version", "3.1.1,soft", "allowed are"},
		{"options", "seal,rsize=1048576", ""},
		{"options", "seal,,sign", `mount option ""`},
		{"options", "soft", "data are lost"},
		{"path", "/srv", `"path" is unknown: engine smb knows folder, options, server, share, version`},
	} {
		t.Run(fmt.Sprintf("%s=%.40q", c.name, c.value), func(t *testing.T) {
			params, secrets := good()
			params[c.name] = c.value
			_, err := check(params, secrets)
			judge(t, err, c.says)
		})
	}
}

func TestSecretsAreCheckedAndNotShown(t *testing.T) {
	for _, c := range []struct{ name, value, says string }{
		{"username", "quarry@example.com", ""},
		{"username", "", `"username" is missing`},
		{"username", `LAB\quarry`, `a secret of its own, "domain"`},
		{"username", strings.Repeat("u", 257), "256 bytes"},
		{"password", "a", ""},
		{"password", "", `"password" is missing`},
		{"password", hidden + "\n", "line break at its end"},
		{"password", hidden + "\xff", "cannot be printed"},
		{"password", strings.Repeat(hidden, 60), "512 bytes"},
		{"domain", "LAB", ""},
		{"domain", "LAB\x00", "cannot be printed"},
		{"user", hidden, `"user" is unknown: engine smb knows domain, password, username`},
	} {
		t.Run(c.name+" "+c.says, func(t *testing.T) {
			params, secrets := good()
			secrets[c.name] = c.value
			_, err := check(params, secrets)
			judge(t, err, c.says)
		})
	}
}

func TestTwoEntriesOfOneFolderAreOnePlace(t *testing.T) {
	same := Place(map[string]string{"server": "nas.example.com", "share": "k8s", "folder": "Prod"})
	for _, p := range []map[string]string{
		{"server": "NAS.example.com.", "share": "K8S", "folder": "prod/"},
		{"server": "nas.example.com:445", "share": "k8s", "folder": "/prod", "version": "3.0"},
	} {
		if got := Place(p); got != same {
			t.Errorf("%v is %q, not %q", p, got, same)
		}
	}
	for _, p := range []map[string]string{
		{"server": "nas.example.com", "share": "k8s"},
		{"server": "nas.example.com:4450", "share": "k8s", "folder": "prod"},
		{"server": "nas2.example.com", "share": "k8s", "folder": "prod"},
		{"server": "//nas", "share": "k8s", "folder": "prod"},
	} {
		if got := Place(p); got == same {
			t.Errorf("%v is %q, too", p, got)
		}
	}
}

// judge expects success, or a fault.Invalid with certain words and without the secret.
func judge(t *testing.T, err error, says string) {
	t.Helper()
	switch {
	case says == "" && err != nil:
		t.Errorf("refused: %v", err)
	case says == "":
	case !errors.Is(err, fault.Invalid) || !strings.Contains(err.Error(), says):
		t.Errorf("the error is %v; it should be invalid and say %q", err, says)
	case strings.Contains(err.Error(), hidden):
		t.Errorf("the error shows the secret: %v", err)
	}
}
