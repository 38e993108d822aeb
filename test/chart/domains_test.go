package chart

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/quarry-csi/quarry/pkg/domain"
	"github.com/quarry-csi/quarry/pkg/engines/dir"
	"github.com/quarry-csi/quarry/pkg/engines/gluster"
	"github.com/quarry-csi/quarry/pkg/engines/lvm"
	"github.com/quarry-csi/quarry/pkg/engines/sharedfs"
	"github.com/quarry-csi/quarry/pkg/engines/smb"
)

// registry is what a domains file is checked with; cmd/internal/engines has the same.
func registry() domain.Registry {
	return domain.Registry{
		"dir":      {Params: dir.Params, Scope: domain.ScopeNode, Directory: "path"},
		"gluster":  {Params: gluster.Params, Scope: domain.ScopeShared, Place: gluster.Place},
		"lvm":      {Params: lvm.Params, Scope: domain.ScopeNode},
		"sharedfs": {Params: sharedfs.Params, Scope: domain.ScopeShared, Directory: "path"},
		"smb":      {Params: smb.Params, Scope: domain.ScopeShared, Place: smb.Place},
	}
}

// load writes the domains file of a release to where it stands in the pod, and reads it
// as the controller does.
func load(t *testing.T, r rendered, secrets map[string]string) ([]domain.Entry, error) {
	t.Helper()
	here := t.TempDir()
	text := into[corev1.ConfigMap](t, r.one(t, "ConfigMap", "quarry-domains")).Data["domains.yaml"]
	for path, content := range secrets {
		if !strings.Contains(text, path) {
			t.Errorf("%s is not in\n%s", path, text)
		}
		at := filepath.Join(here, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		text = strings.ReplaceAll(text, path, at)
	}
	file := filepath.Join(here, "domains.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return domain.Load(file, registry())
}

func TestTheControllerReadsTheDomainsOfTheValues(t *testing.T) {
	entries, err := load(t, mustRender(t, release{}), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 || entries[0].Name != "local" || entries[0].Scope != domain.ScopeNode || entries[0].Params["path"] != "/var/lib/quarry/local" {
		t.Errorf("%+v", entries)
	}
}

func TestEveryFieldOfADomainArrives(t *testing.T) {
	r := mustRender(t, release{values: everything})
	entries, err := load(t, r, map[string]string{"/run/secrets/quarry-domains/vg/secrets.yaml": "password: hunter2\n"})
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 6 {
		t.Fatalf("%+v", entries)
	}
	disk := entries[1]
	if disk.Overcommit != 1.5 || disk.CapacityLimit != 100<<30 || disk.BackgroundRate != 50<<20 || !disk.NativeOnly || !slices.Equal(disk.Aliases, []string{"old"}) {
		t.Errorf("%+v", disk)
	}
	if far, own := entries[4], entries[5]; far.Socket != "/run/example/engine.sock" || far.Engine != domain.SocketEngine || far.Params["pool"] != "a" || !own.Process {
		t.Errorf("%+v", entries)
	}
	if entries[2].Scope != domain.ScopeShared || entries[3].Secrets["password"] != "hunter2" {
		t.Errorf("%+v", entries)
	}
	// The file with the secret is where the entry says, for the controller alone.
	quarry := containers(t, r)["quarry"]
	if !slices.ContainsFunc(quarry.VolumeMounts, func(m corev1.VolumeMount) bool {
		return m.MountPath == "/run/secrets/quarry-domains/vg" && m.ReadOnly
	}) {
		t.Errorf("%+v", quarry.VolumeMounts)
	}
	if strings.Contains(r["domains.yaml"], "hunter2") {
		t.Error("the ConfigMap has the secret")
	}
}
