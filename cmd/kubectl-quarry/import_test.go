package main

import (
	"strings"
	"testing"
)

func TestImportPrintsThePersistentVolume(t *testing.T) {
	endpoint := serve(t, &fake{})
	for args, want := range map[string]string{
		"import v --domain local --source a.img --claim shop/data -o yaml": `apiVersion: v1
kind: PersistentVolume
metadata:
  name: v
spec:
  accessModes:
  - ReadWriteOnce
  capacity:
    storage: "1610612736"
  claimRef:
    apiVersion: v1
    kind: PersistentVolumeClaim
    name: data
    namespace: shop
  csi:
    driver: csi.quarry.dev
    fsType: ext4
    volumeHandle: local/v9
  nodeAffinity:
    required:
      nodeSelectorTerms:
      - matchExpressions:
        - key: csi.quarry.dev/node
          operator: In
          values:
          - n1
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  volumeMode: Filesystem
`,
		"import v --domain nas --source a.img --block --access-mode ReadWriteOncePod -o yaml": `apiVersion: v1
kind: PersistentVolume
metadata:
  name: v
spec:
  accessModes:
  - ReadWriteOncePod
  capacity:
    storage: "1610612736"
  csi:
    driver: csi.quarry.dev
    volumeHandle: nas/v9
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  volumeMode: Block
`,
		"import v --domain local --source a.img":           "Imported: volume \"v\" is local/v9, 1.5Gi with ext4.\nThe same command with -o yaml prints its PersistentVolume.\n",
		"import v --domain local --source a.img --dry-run": "Would be imported: volume \"v\" of domain local, 1.5Gi with ext4. Nothing was changed.\n",
	} {
		out, _, err := do(append(strings.Fields(args), "--admin-endpoint", endpoint)...)
		if err != nil || out != want {
			t.Errorf("%s: %v\n%s\nwant\n%s", args, err, out, want)
		}
	}
	for args, want := range map[string]string{
		"import v --domain local --source gone.img":                          "there is no /srv/import/gone.img",
		"import v --domain local":                                            `required flag(s) "source" not set`,
		"import v --domain local --source a.img --claim data":                `--claim "data": must be NAMESPACE/NAME`,
		"import v --domain local --source a.img --access-mode ReadWriteMany": `--access-mode "ReadWriteMany" is not allowed: ReadWriteOnce, ReadWriteOncePod, ReadOnlyMany`,
		"import --domain local --source a.img":                               "accepts 1 arg(s), received 0",
	} {
		if _, _, err := do(append(strings.Fields(args), "--admin-endpoint", endpoint)...); err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", args, err, want)
		}
	}
}
