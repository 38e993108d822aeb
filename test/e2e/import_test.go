package e2e

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// TestAnExistingFileIsImported, and used by a claim for the volume that kubectl quarry prints.
func TestAnExistingFileIsImported(t *testing.T) {
	r := newRig(t)
	name := "legacy-" + r.ns
	_, err := r.program(r.command, "exec", r.nodes[0], "sh", "-ec", fmt.Sprintf(
		`mkdir -p /srv/shared/import; cd /srv/shared/import; truncate -s 64M %[1]s.img; mkfs.ext4 -q %[1]s.img
		mount -o loop %[1]s.img /mnt; echo kept >/mnt/file; umount /mnt`, name))
	r.must(err)
	out, err := r.program(r.quarry, "import", name, "--domain", "shared", "--source", name+".img", "--claim", r.ns+"/data", "-o", "yaml")
	r.must(err)
	var pv corev1.PersistentVolume
	r.must(yaml.UnmarshalStrict([]byte(out), &pv))
	if pv.Spec.PersistentVolumeReclaimPolicy != corev1.PersistentVolumeReclaimRetain {
		r.Fatalf("what was imported would be deleted with its claim: %s", out)
	}
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete // the scenario leaves nothing
	_, err = r.kube.CoreV1().PersistentVolumes().Create(bg, &pv, metav1.CreateOptions{})
	r.must(err)
	r.claim(claim{name: "data", class: "", size: "64Mi", volume: pv.Name})
	r.start(pod{name: "user", claims: []string{"data"}})
	if got := r.sh("user", "cat /data/file"); got != "kept" {
		r.Fatalf("the imported file holds %q", got)
	}
	r.write("user", "/data/new")
}
