package chart

import (
	"slices"
	"strings"
	"testing"
)

// images of all containers.
func images(t *testing.T, r rendered) []string {
	t.Helper()
	var out []string
	for _, c := range containers(t, r) {
		out = append(out, c.Image)
	}
	for _, c := range daemonSet(t, r).Spec.Template.Spec.Containers {
		out = append(out, c.Image)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// What the README lists for sites without registries is all that is pulled.
func TestTheListOfImagesIsComplete(t *testing.T) {
	_, list, ok := strings.Cut(read(t, "charts/quarry/README.md"), "\n## Images\n")
	if !ok {
		t.Fatal("README.md has no list")
	}
	list = strings.Split(list, "```")[1]
	listed := strings.Fields(list)
	slices.Sort(listed)
	if got := images(t, mustRender(t, release{values: everything})); !slices.Equal(got, listed) {
		t.Errorf("pulled: %q\nlisted: %q", got, listed)
	}
}

func TestOneRegistryForAllImages(t *testing.T) {
	for _, image := range images(t, mustRender(t, release{values: everything + "imageRegistry: mirror.example.com:5000/third/\n"})) {
		if !strings.HasPrefix(image, "mirror.example.com:5000/third/quarry-csi/") && !strings.HasPrefix(image, "mirror.example.com:5000/third/sig-storage/") {
			t.Error(image)
		}
	}
	digest := "sha256:" + strings.Repeat("0a", 32)
	got := images(t, mustRender(t, release{values: "image: {registry: docker.io, repository: library/quarry, tag: dev, digest: '" + digest + "'}"}))
	if !slices.Contains(got, "docker.io/library/quarry@"+digest) {
		t.Errorf("%q", got)
	}
}

func TestPullSecretsAreEverywhere(t *testing.T) {
	r := mustRender(t, release{values: everything})
	for name, secrets := range map[string]int{
		"controller": len(deployment(t, r).Spec.Template.Spec.ImagePullSecrets), "node": len(daemonSet(t, r).Spec.Template.Spec.ImagePullSecrets),
	} {
		if secrets != 1 {
			t.Errorf("%s: %d", name, secrets)
		}
	}
}
