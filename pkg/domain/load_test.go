package domain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/quarry-csi/quarry/pkg/engine"
	"github.com/quarry-csi/quarry/pkg/fault"
	"github.com/quarry-csi/quarry/pkg/image"
)

func testRegistry() Registry {
	return Registry{
		"dir": {
			Open: func(context.Context, map[string]string, map[string]string) (engine.Engine, error) {
				return nil, fault.New(fault.Unavailable, "the server is away")
			},
			Params:    func() map[string]string { return map[string]string{"path": "the directory"} },
			Scope:     ScopeNode,
			Directory: "path",
		},
		"share": {
			Params: func() map[string]string {
				return map[string]string{"server": "its name", "export": "its path"}
			},
		},
		"share4": {
			Params: func() map[string]string {
				return map[string]string{"server": "its name", "export": "its path", "version": "of the protocol"}
			},
			Place: func(params map[string]string) string { return params["server"] + ":" + params["export"] },
		},
	}
}

// write puts the text into a domains file in a directory of its own.
func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "domains.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAFullEntryIsReadExactly(t *testing.T) {
	path := write(t, `
domains:
- name: local
  engine: dir
  params: {path: /srv/quarry}
  defaults: native-only
  scope: shared
  overcommit: 1.5
  capacityLimit: 100Gi
  aliases: [old, older]
  takeOver: true
  secretsFile: s.yaml
- name: nas
  engine: share
  params: &p {server: a, export: /x}
- name: nas2
  engine: share
  params:
    server: b
    export: /x
- {name: other, engine: dir, params: {path: /srv/other}}
- {name: far, socket: /run/x/../y.sock, params: {anything: goes}}
- {name: far2, socket: /run/z.sock, engine: san, scope: shared, params: {anything: goes}}
- {name: own, engine: dir, process: true, params: {path: /srv/own}}
`)
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "s.yaml"), []byte("user: me\npassword: hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path, testRegistry())
	if err != nil {
		t.Fatal(err)
	}
	want := []Entry{{
		Name: "local", Engine: "dir", Params: map[string]string{"path": "/srv/quarry"}, NativeOnly: true,
		Scope: "shared", Overcommit: 1.5, CapacityLimit: 100 << 30, Aliases: []string{"old", "older"}, TakeOver: true,
		Secrets: Secrets{"user": "me", "password": "hunter2"},
	}, {
		Name: "nas", Engine: "share", Params: map[string]string{"server": "a", "export": "/x"}, Scope: "shared", Overcommit: 1,
	}, {
		Name: "nas2", Engine: "share", Params: map[string]string{"server": "b", "export": "/x"}, Scope: "shared", Overcommit: 1,
	}, {
		Name: "other", Engine: "dir", Params: map[string]string{"path": "/srv/other"}, Scope: "node", Overcommit: 1,
	}, {
		Name: "far", Engine: "socket", Socket: "/run/y.sock", Params: map[string]string{"anything": "goes"}, Scope: "node", Overcommit: 1,
	}, {
		Name: "far2", Engine: "san", Socket: "/run/z.sock", Params: map[string]string{"anything": "goes"}, Scope: "shared", Overcommit: 1,
	}, {
		Name: "own", Engine: "dir", Process: true, Params: map[string]string{"path": "/srv/own"}, Scope: "node", Overcommit: 1,
	}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %#v\nwant %#v", got, want)
	}
	if c := got[0].Config("node-1"); c.Node != "" {
		t.Errorf("a shared domain has the node %q", c.Node)
	}
	wantConfig := image.DomainConfig{Name: "other", Engine: "dir", Scope: "node", Node: "node-1", Overcommit: 1}
	if c := got[3].Config("node-1"); !reflect.DeepEqual(c, wantConfig) {
		t.Errorf("config %#v, want %#v", c, wantConfig)
	}
}

// Each error is one line that begins with the file; {FILE} stands for its path.
func TestWhatIsWrongIsSaidExactly(t *testing.T) {
	long := strings.Repeat("x", 64)
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	entry := func(more string) string {
		return "domains:\n- name: local\n  engine: dir\n  params: {path: /srv/quarry}\n" + more
	}
	const allowedName = `1 to 63 characters of [a-z0-9-], beginning and ending with a letter or digit`
	for name, c := range map[string]struct{ yaml, want string }{
		"empty file":        {"", `{FILE}: is empty: it must hold domains:, a list with at least one domain`},
		"only a comment":    {"# nothing\n", `{FILE}: is empty: it must hold domains:, a list with at least one domain`},
		"not a map":         {"- a\n", `{FILE}:1: a list: must be a map`},
		"no domains":        {"{}\n", `{FILE}:1: domains: is missing: it must be a list with at least one domain`},
		"domains null":      {"domains:\n", `{FILE}:1: domains: is missing: it must be a list with at least one domain`},
		"empty list":        {"domains: []\n", `{FILE}:1: domains: is empty: it must hold at least one domain`},
		"domains a map":     {"domains: {a: b}\n", `{FILE}:1: domains: a map: must be a list`},
		"domain a string":   {"domains: [local]\n", `{FILE}:1: domains[0]: value "local": must be a map`},
		"unknown at top":    {"domain: []\n", `{FILE}:1: domain: unknown field: only "domains" is known`},
		"unknown in domain": {entry("  sise: 1\n"), `{FILE}:5: domains[0].sise: unknown field: known are "name", "engine", "socket", "process", "params", "defaults", "secretsFile", "scope", "overcommit", "capacityLimit", "backgroundRate", "aliases", "takeOver"`},
		"given twice":       {entry("  engine: dir\n"), `{FILE}:5: domains[0].engine: is given twice: line 3 has it already`},
		"second document":   {"domains: []\n---\ndomains: []\n", `{FILE}:2: a second document begins here: one is allowed`},
		"broken YAML":       {"domains: [\n", `{FILE}: yaml: line 1: did not find expected node content`},
		"no name":           {"domains:\n- engine: dir\n", `{FILE}:2: domains[0]: name is missing`},
		"numeric name":      {"domains:\n- name: 12\n", `{FILE}:2: domains[0].name: value "12": must be a string: write it in quotes: "12"`},
		"upper-case name":   {"domains:\n- name: Local\n", `{FILE}:2: domains[0].name: value "Local" is not allowed: ` + allowedName},
		"long name":         {"domains:\n- name: " + long + "\n", `{FILE}:2: domains[0].name: value "` + long + `" is not allowed: ` + allowedName},
		"dash at the end":   {"domains:\n- name: a-\n", `{FILE}:2: domains[0].name: value "a-" is not allowed: ` + allowedName},
		"dots":              {"domains:\n- name: a.b\n", `{FILE}:2: domains[0].name: value "a.b" is not allowed: ` + allowedName},
		"control character": {"domains:\n- name: \"a\\nb\"\n", `{FILE}:2: domains[0].name: value "a\nb" is not allowed: ` + allowedName},
		"no engine":         {"domains:\n- name: local\n", `{FILE}:2: domain "local": domains[0]: engine is missing`},
		"unknown engine":    {"domains:\n- name: local\n  engine: zfs\n", `{FILE}:3: domain "local": domains[0].engine: engine "zfs" is unknown: known are "dir", "share", "share4"`},
		"unknown parameter": {"domains:\n- name: local\n  engine: dir\n  params: {pth: /x}\n", `{FILE}:4: domain "local": domains[0].params.pth: unknown field: only "path" is known`},
		"numeric parameter": {"domains:\n- name: local\n  engine: dir\n  params: {path: 010}\n", `{FILE}:4: domain "local": domains[0].params.path: value "010": must be a string: write it in quotes: "010"`},
		"params a list":     {"domains:\n- name: local\n  engine: dir\n  params: []\n", `{FILE}:4: domain "local": domains[0].params: a list: must be a map`},
		"bad defaults":      {entry("  defaults: never\n"), `{FILE}:5: domain "local": domains[0].defaults: value "never" is not allowed: known are "allow", "native-only"`},
		"bad scope":         {entry("  scope: cluster\n"), `{FILE}:5: domain "local": domains[0].scope: value "cluster" is not allowed: known are "shared", "node"`},
		"overcommit zero":   {entry("  overcommit: 0\n"), `{FILE}:5: domain "local": domains[0].overcommit: value "0": must be a number greater than 0, such as 1.5`},
		"overcommit minus":  {entry("  overcommit: -1\n"), `{FILE}:5: domain "local": domains[0].overcommit: value "-1": must be a number greater than 0, such as 1.5`},
		"overcommit nan":    {entry("  overcommit: .nan\n"), `{FILE}:5: domain "local": domains[0].overcommit: value ".nan": must be a number greater than 0, such as 1.5`},
		"overcommit inf":    {entry("  overcommit: .inf\n"), `{FILE}:5: domain "local": domains[0].overcommit: value ".inf": must be a number greater than 0, such as 1.5`},
		"overcommit text":   {entry("  overcommit: lots\n"), `{FILE}:5: domain "local": domains[0].overcommit: value "lots": must be a number greater than 0, such as 1.5`},
		"limit zero":        {entry("  capacityLimit: 0\n"), `{FILE}:5: domain "local": domains[0].capacityLimit: value "0": must be greater than 0; leave it out for no limit`},
		"limit overflowing": {entry("  capacityLimit: 8Ei\n"), `{FILE}:5: domain "local": domains[0].capacityLimit: quantity "8Ei" is more than 9223372036854775807 bytes`},
		"limit a map":       {entry("  capacityLimit: {a: b}\n"), `{FILE}:5: domain "local": domains[0].capacityLimit: a map: must be a quantity of bytes, such as 100Gi`},
		"limit misspelled":  {entry("  capacityLimit: 10GB\n"), `{FILE}:5: domain "local": domains[0].capacityLimit: "10GB" is not a quantity: a number of bytes, or a number with k, M, G, T, P, E (powers of 1000) or Ki, Mi, Gi, Ti, Pi, Ei (powers of 1024), such as 100Gi`},
		"takeOver a string": {entry("  takeOver: yes please\n"), `{FILE}:5: domain "local": domains[0].takeOver: value "yes please": must be true or false`},
		"alias of its own":  {entry("  aliases: [local]\n"), `{FILE}:5: domain "local": domains[0].aliases: value "local" is the name of a domain already`},
		"alias twice":       {entry("  aliases: [b, b]\n"), `{FILE}:5: domain "local": domains[0].aliases: value "b" is an alias of domain "local" already`},
		"alias malformed":   {entry("  aliases: [a/b]\n"), `{FILE}:5: domain "local": domains[0].aliases[0]: value "a/b" is not allowed: ` + allowedName},
		"name twice":        {entry("- {name: local, engine: dir, params: {path: /y}}\n"), `{FILE}:5: domain "local": domains[1].name: value "local" is the name of a domain already`},
		"name is an alias":  {entry("  aliases: [b]\n- {name: b, engine: dir, params: {path: /y}}\n"), `{FILE}:6: domain "b": domains[1].name: value "b" is an alias of domain "local" already`},
		"one path twice":    {entry("- {name: b, engine: dir, params: {path: /srv/./quarry/}}\n"), `{FILE}:5: domain "b": domains[1].params: is the same storage as that of domain "local": a storage can be one domain only`},
		"path by a link":    {"domains:\n- {name: a, engine: dir, params: {path: " + dir + "}}\n- {name: b, engine: dir, params: {path: " + link + "}}\n", `{FILE}:3: domain "b": domains[1].params: is the same storage as that of domain "a": a storage can be one domain only`},
		"one share twice":   {"domains:\n- {name: a, engine: share, params: &p {server: s, export: /e}}\n- {name: b, engine: share, params: *p}\n", `{FILE}:2: domain "b": domains[1].params: is the same storage as that of domain "a": a storage can be one domain only`},
		"relative socket":   {"domains:\n- {name: a, socket: run/x.sock}\n", `{FILE}:2: domain "a": domains[0].socket: value "run/x.sock": must be the absolute path of a Unix socket, such as /run/example/engine.sock`},
		"endless socket":    {"domains:\n- {name: a, socket: /" + strings.Repeat("x", 107) + "}\n", `{FILE}:2: domain "a": domains[0].socket: value "/` + strings.Repeat("x", 107) + `" has 108 bytes: the path of a socket may have 107`},
		"socket a number":   {"domains:\n- {name: a, socket: 7}\n", `{FILE}:2: domain "a": domains[0].socket: value "7": must be a string: write it in quotes: "7"`},
		"both":              {"domains:\n- {name: a, socket: /x, process: true}\n", `{FILE}:2: domain "a": domains[0].process: value true does not go with socket: a process is started by Quarry, or listens on a socket`},
		"process a string":  {entry("  process: always\n"), `{FILE}:5: domain "local": domains[0].process: value "always": must be true or false`},
		"process unknown":   {"domains:\n- {name: a, engine: zfs, process: true}\n", `{FILE}:2: domain "a": domains[0].engine: engine "zfs" is unknown: known are "dir", "share", "share4"`},
		"empty type":        {"domains:\n- {name: a, engine: \"\", socket: /x}\n", `{FILE}:2: domain "a": domains[0].engine: value "": must be the type that the process says it is, or be left out`},
		"our own names":     {"domains:\n- {name: a, socket: /x, params: {quarry.dev/socket: /y}}\n", `{FILE}:2: domain "a": domains[0].params.quarry.dev/socket: is not allowed: names that begin with quarry.dev/ are Quarry's own`},
		"one place twice":   {"domains:\n- {name: a, engine: share4, params: {server: s, export: /e, version: '4.1'}}\n- {name: b, engine: share4, params: {server: s, export: /e}}\n", `{FILE}:3: domain "b": domains[1].params: is the same storage as that of domain "a": a storage can be one domain only`},
		"one socket twice":  {"domains:\n- {name: a, socket: /x, params: &p {k: v}}\n- {name: b, socket: /./x, params: *p}\n", `{FILE}:2: domain "b": domains[1].params: is the same storage as that of domain "a": a storage can be one domain only`},
		"ours and a socket": {"domains:\n- {name: a, engine: dir, params: {path: /p}}\n- {name: b, engine: dir, socket: /x, params: {path: /p/}}\n", `{FILE}:3: domain "b": domains[1].params: is the same storage as that of domain "a": a storage can be one domain only`},
		"no params twice":   {"domains:\n- {name: a, engine: share}\n- {name: b, engine: share}\n", `{FILE}:3: domain "b": domains[1].name: is the same storage as that of domain "a": a storage can be one domain only`},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, c.yaml)
			_, err := Load(path, testRegistry())
			if err == nil {
				t.Fatal("it was accepted")
			}
			if !errors.Is(err, fault.Invalid) {
				t.Errorf("kind %v, want invalid", fault.KindOf(err))
			}
			if got := strings.ReplaceAll(err.Error(), path, "{FILE}"); got != c.want {
				t.Errorf("\ngot  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestFilesThatCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none"), nil); err == nil || err.Error() != "domains file: stat "+dir+"/none: no such file or directory" {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(dir, nil); err == nil || err.Error() != "domains file "+dir+" is not a regular file" {
		t.Errorf("directory: %v", err)
	}
}

func TestSecretsAreGuardedAndNeverShown(t *testing.T) {
	for name, c := range map[string]struct {
		mode    os.FileMode
		content string
		want    string // after the field; {S} stands for the secrets file
	}{
		"group may read": {0o640, "a: hunter2\n", `{S} has mode 0640, so that others than its owner can use it: chmod 0600 {S}`},
		"all may read":   {0o604, "a: hunter2\n", `{S} has mode 0604, so that others than its owner can use it: chmod 0600 {S}`},
		"not YAML":       {0o600, "a: [hunter2\n", `{S} is not one YAML map of strings (its content is not shown)`},
		"unknown anchor": {0o600, "a: *hunter2\n", `{S} is not one YAML map of strings (its content is not shown)`},
		"empty":          {0o600, "", `{S} is not one YAML map of strings (its content is not shown)`},
		"a scalar":       {0o600, "hunter2\n", `{S} is not a YAML map of strings with different names (its content is not shown)`},
		"given twice":    {0o600, "hunter2: a\nhunter2: b\n", `{S} is not a YAML map of strings with different names (its content is not shown)`},
		"a number":       {0o600, "a: b\nc: 12345\n", `{S}:2: a value is not a string: write it in quotes (its content is not shown)`},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "domains:\n- name: local\n  engine: dir\n  params: {path: /srv/quarry}\n  secretsFile: s.yaml\n")
			secrets := filepath.Join(filepath.Dir(path), "s.yaml")
			if err := os.WriteFile(secrets, []byte(c.content), c.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(secrets, c.mode); err != nil {
				t.Fatal(err)
			}
			_, err := Load(path, testRegistry())
			if err == nil {
				t.Fatal("it was accepted")
			}
			want := path + `:5: domain "local": domains[0].secretsFile: ` + strings.ReplaceAll(c.want, "{S}", secrets)
			if err.Error() != want {
				t.Errorf("\ngot  %s\nwant %s", err, want)
			}
			if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "12345") {
				t.Errorf("a secret is shown: %s", err)
			}
		})
	}

	e := Entry{Name: "local", Secrets: Secrets{"hunter1": "hunter2"}}
	asJSON, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	for _, shown := range []string{fmt.Sprintf("%v %+v %#v %s %q %x %d", e, e, e, e.Secrets, e.Secrets, e.Secrets, e.Secrets), string(asJSON)} {
		if strings.Contains(shown, "hunter") || !strings.Contains(shown, "(1 secret)") {
			t.Errorf("shown as %s", shown)
		}
	}
}

func TestQuantities(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "1048576": 1 << 20, "1k": 1000, "1Ki": 1024, "1.5Gi": 3 << 29, "100Gi": 100 << 30,
		"2T": 2e12, "1E": 1e18, "7Ei": 7 << 60, "1e3": 1000, "1E3": 1000, "15e-1": 2, ".5k": 500, "0.1": 1,
	} {
		if got, err := ParseQuantity(s); err != nil || got != want {
			t.Errorf("ParseQuantity(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "-1", "+1", "1 Gi", "1gi", "1K", "1GB", "Gi", ".", "1e", "0x10", "1_000", "9223372036854775808", "1e400", "1m"} {
		if got, err := ParseQuantity(s); err == nil {
			t.Errorf("ParseQuantity(%q) = %d, want an error", s, got)
		}
	}
}

func TestOpenKeepsTheEnginesKindAndNamesTheDomain(t *testing.T) {
	_, err := testRegistry().Open(context.Background(), Entry{Name: "local", Engine: "dir"})
	if !errors.Is(err, fault.Unavailable) || err.Error() != "open in domain local: the server is away" {
		t.Errorf("got %v", err)
	}
	_, err = testRegistry().Open(context.Background(), Entry{Name: "local", Engine: "zfs"})
	if !errors.Is(err, fault.Invalid) {
		t.Errorf("got %v", err)
	}
}

// Kubernetes mounts a secret for root and the group of a pod, with mode 0440.
func TestAProcessWithoutPrivilegeReadsSecretsThroughItsGroup(t *testing.T) {
	if path := os.Getenv("QUARRY_TEST_SECRET"); path != "" {
		s, err := ReadSecrets(path)
		fmt.Printf("read %q, %v\n", s["password"], err)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("giving files away needs root")
	}
	dir, err := os.MkdirTemp("", "quarry-secrets")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "secrets.yaml")
	if err := os.WriteFile(path, []byte("password: hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 0, 65532); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[os.FileMode]string{0o440: `read "hunter2", <nil>`, 0o640: `read "hunter2", <nil>`, 0o444: "mode 0444", 0o460: "mode 0460"} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Dir, cmd.Env = dir, []string{"QUARRY_TEST_SECRET=" + path}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65532, Gid: 65532}}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%04o: %v, %s: want %s", mode, err, out, want)
		}
	}
	// To root, who reads everything, the group is others.
	if err := os.Chmod(path, 0o440); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadSecrets(path); !errors.Is(err, fault.Invalid) {
		t.Error(err)
	}
}
