package docs

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const (
	builtImage  = "docker.io/library/quarry:dev"
	newerTag    = "dev-newer"
	suiteImages = "registry.k8s.io/e2e-test-images/busybox"
	noVolumes   = `test -z "$(kubectl get pv -o jsonpath='{range .items[?(@.spec.csi.driver=="csi.quarry.dev")]}{.metadata.name}{"\n"}{end}')"`
)

// TestTheCommandsOfINSTALL, from an empty cluster to an empty cluster.
func TestTheCommandsOfINSTALL(t *testing.T) {
	r := onACluster(t)
	page := filepath.Join(r.checkout, "docs/INSTALL.md")
	text, err := os.ReadFile(page)
	r.must(err)
	ours := regexp.MustCompile("`(--set image.registry=[^`]*)`").FindSubmatch(text)
	if ours == nil {
		r.Fatal("docs/INSTALL.md does not say how an own image is named any more")
	}
	const (
		build    = "hack/image --name docker.io/library/quarry:dev --output quarry.tar"
		bring    = "ctr -n k8s.io images import quarry.tar"
		label    = "kubectl label namespace quarry-system pod-security.kubernetes.io/enforce=privileged"
		install  = "helm install quarry charts/quarry --namespace quarry-system"
		classes  = "helm upgrade quarry charts/quarry --namespace quarry-system --reuse-values -f values.yaml"
		upgrade  = "helm upgrade quarry charts/quarry --namespace quarry-system --reuse-values"
		first    = "kubectl wait pod/writer --for=condition=Ready --timeout=5m"
		snapshot = "kubectl wait volumesnapshot/evening --for=jsonpath='{.status.readyToUse}'=true --timeout=5m"
		grow     = `kubectl patch pvc data --patch '{"spec": {"resources": {"requests": {"storage": "2Gi"}}}}'`
		look     = "kubectl get volumeattachments,pv -o custom-columns=KIND:.kind,NAME:.metadata.name,DRIVER:.spec.csi.driver,ATTACHER:.spec.attacher"
		uninst   = "helm uninstall quarry --namespace quarry-system"
		plain    = "kubectl apply -f deploy/quarry.yaml"
		gone     = "kubectl delete --ignore-not-found -f deploy/quarry.yaml"
		taint    = "kubectl taint node NODE node.kubernetes.io/out-of-service=nodeshutdown:NoExecute"
		rollout  = "kubectl -n quarry-system rollout status daemonset/quarry-node"
	)
	lost := r.nodes[1]
	rollouts := 0
	// symptom is one of the page's, seen where the page says.
	symptom := func(says, script string) {
		r.Helper()
		if !strings.Contains(string(text), says) {
			r.Errorf("docs/INSTALL.md does not speak of %q any more", says)
		}
		r.says(says, script)
	}
	r.follow("docs/INSTALL.md", given{
		onNodes: []string{bring},
		before: map[string]func(){
			bring: func() { r.bring("quarry.tar") },
			"kubectl apply -f first.yaml": func() {
				// No image can be pulled here: the suite's busybox has the name.
				r.everywhere("ctr -n k8s.io images tag --force $(ctr -n k8s.io images ls -q | grep ^" + suiteImages + ": | head -n 1) docker.io/library/busybox:1.37")
			},
			label: func() {
				if out, err := r.try(install + " --set logLevel=11"); err == nil || !strings.Contains(err.Error(), "logLevel") {
					r.Errorf("a wrong value: %s, %v", out, err)
				}
				r.sh("kubectl label namespace quarry-system pod-security.kubernetes.io/enforce=baseline")
				r.sh(install)
				symptom("violates PodSecurity", "kubectl -n quarry-system describe daemonset quarry-node")
				r.sh(uninst + " --wait")
				r.sh("kubectl label namespace quarry-system pod-security.kubernetes.io/enforce-")
			},
			upgrade: func() {
				r.everywhere("ctr -n k8s.io images tag --force " + builtImage + " docker.io/library/quarry:" + newerTag)
				r.sh("kubectl exec writer -- sh -c 'while :; do date +%s >>/data/ticks; sync /data/ticks; sleep 0.2; done' >/dev/null 2>&1 &")
			},
			taint: func() {
				r.command("stop", "node", lost)
				r.says("Unknown", "kubectl get node "+lost+` -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}'`)
			},
			look: func() { r.deleteVolumes() },
			plain: func() {
				// The published image has no registry yet: the built one has its name.
				image := strings.TrimSpace(r.sh(`sed -n 's/^ *image: \(.*quarry-csi.*\)$/\1/p' deploy/quarry.yaml | sort -u`))
				r.everywhere("ctr -n k8s.io images tag --force " + builtImage + " " + image)
				r.wait("the namespace to be gone", func() error { _, err := r.try("! kubectl get namespace quarry-system 2>/dev/null"); return err })
			},
			"kubectl delete --ignore-not-found -f deploy/group-snapshot-class.yaml -f deploy/snapshot-class.yaml": func() {
				r.sh("kubectl apply -f first.yaml -f snapshot.yaml")
				r.sh(first)
				r.sh(snapshot)
				r.deleteVolumes()
			},
		},
		after: map[string]func(string){
			rollout: func(string) {
				rollouts++
				r.sh("kubectl -n quarry-system rollout status deployment/quarry-controller; kubectl quarry version")
			},
			first: func(string) {
				r.says("Bound", "kubectl get pvc data -o jsonpath='{.status.phase}'")
				r.sh("kubectl exec writer -- grep -q : /data/log")
				r.apply(pvc("lonely", "quarry", "ReadWriteOnce", "64Mi", "") + pvc("huge", "quarry", "ReadWriteOnce", "900Ti", "") + user("huge", "huge", ""))
				symptom("waiting for first consumer", "kubectl describe pvc lonely")
				symptom("did not have enough free storage", "kubectl describe pod huge")
				r.sh("kubectl delete pod huge --grace-period=0 && kubectl delete pvc lonely huge")
			},
			classes: func(string) {
				symptom("hostPath type check failed", "kubectl -n quarry-system describe pods -l app.kubernetes.io/component=node --show-events")
				r.mountDisks(r.nodes...)
			},
			snapshot: func(string) { r.restoresAndClones() },
			grow:     func(string) { r.grown() },
			"kubectl get storageclasses": func(said string) {
				for _, c := range []string{"quarry", "fast", "shared", "precious"} {
					if !strings.Contains(said, "\n"+c+" ") {
						r.Errorf("there is no class %s:\n%s", c, said)
					}
				}
				r.useClasses()
			},
			upgrade: func(string) { r.upgraded(); r.operate() },
			"kubectl quarry domains": func(said string) {
				if !strings.Contains(said, "local") {
					r.Errorf("kubectl quarry domains says\n%s", said)
				}
			},
			taint: func(string) { r.nodeIsBack(lost) },
			look: func(said string) {
				if strings.Contains(said, "csi.quarry.dev") {
					r.Errorf("there is still\n%s", said)
				}
			},
			uninst: func(string) { r.uninstalled() },
			gone: func(string) {
				if left := r.sh("all=$(kubectl get csidriver,storageclass,clusterrole,clusterrolebinding,namespace,volumesnapshotclass -o name) && sed -n /quarry/p <<<\"$all\""); left != "" {
					r.Errorf("there is still\n%s", left)
				}
			},
		},
		other: map[string][2]string{
			install: {install + " " + string(ours[1]), "no registry has an image: the page says so, and to say this"},
			upgrade: {upgrade + " --set image.tag=" + newerTag, "there is no newer version: it is the same under another name, so that all pods are replaced"},
			taint:   {strings.Replace(taint, "NODE", lost, 1), "that node was powered off"},
		},
		not: map[string]string{
			"kubectl kustomize client/config/crd":   "it is of another project's checkout; hack/cluster has installed the same",
			"docker build -t REGISTRY/quarry:TAG .": "it needs a registry for its base images; hack/image builds the same Dockerfile",
		},
		last: []string{"Uninstall", "Without Helm"},
	})
	const inOne = install + " --create-namespace"
	r.follow("charts/quarry/README.md", given{
		after: map[string]func(string){inOne: func(string) {
			r.sh("kubectl -n quarry-system rollout status deployment/quarry-controller && " + rollout + " && " + uninst + " --wait && kubectl delete namespace quarry-system")
		}},
		not: map[string]string{
			"helm template":     "the text names it; test/chart renders with it",
			"quarry controller": "the text names the program",
			"quarry node":       "the text names the program",
		},
		blocks: map[string]string{"ghcr.io/": "the list of images: test/chart compares it"},
	})
	if rollouts != 2 {
		r.Errorf("it was installed %d times, want with Helm and without", rollouts)
	}
}

// everywhere runs a script on all nodes.
func (r *reader) everywhere(script string) {
	r.Helper()
	for _, n := range r.nodes {
		r.on(n, script)
	}
}

// command is one of hack/cluster.
func (r *reader) command(args ...string) {
	r.Helper()
	r.sh(r.cluster + " " + strings.Join(args, " "))
}

// mountDisks: what "mount the disk first" means. The share is one directory, bound on all nodes.
func (r *reader) mountDisks(nodes ...string) {
	for _, n := range nodes {
		r.on(n, `mkdir -p /mnt/disk /mnt/share /srv/shared/share
			mountpoint -q /mnt/share || mount --bind /srv/shared/share /mnt/share
			[ -e /var/lib/disk.img ] || { truncate -s 4G /var/lib/disk.img; mkfs.ext4 -q /var/lib/disk.img; }
			mountpoint -q /mnt/disk || mount -o loop /var/lib/disk.img /mnt/disk`)
	}
}

func pvc(name, class, mode, size, source string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: %s}\nspec:\n  storageClassName: %s\n  accessModes: [%s]\n  resources: {requests: {storage: %s}}\n%s\n", name, class, mode, size, source)
}

func user(name, claim, node string) string {
	on := ""
	if node != "" {
		on = "  nodeSelector: {kubernetes.io/hostname: " + node + "}\n"
	}
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s}\nspec:\n%s  terminationGracePeriodSeconds: 0\n  containers:\n  - {name: main, image: \"busybox:1.37\", command: [sleep, infinity], volumeMounts: [{name: data, mountPath: /data}]}\n"+
		"  volumes:\n  - {name: data, persistentVolumeClaim: {claimName: %s}}\n", name, on, claim)
}

func (r *reader) running(pods ...string) {
	r.Helper()
	for _, p := range pods {
		r.sh("kubectl wait pod/" + p + " --for=condition=Ready --timeout=5m")
	}
}

// restoresAndClones: the claim from the snapshot, and the clone that the text describes, hold what was written,
// on the other node too.
func (r *reader) restoresAndClones() {
	r.Helper()
	at := strings.TrimSpace(r.sh("kubectl get pod writer -o jsonpath='{.spec.nodeName}'"))
	other := r.nodes[0]
	if other == at {
		other = r.nodes[1]
	}
	r.apply(user("restored", "restored", at) + pvc("cloned", "quarry", "ReadWriteOnce", "1Gi", "  dataSource: {kind: PersistentVolumeClaim, name: data}") + user("cloned", "cloned", other))
	r.running("restored", "cloned")
	want := r.sh("kubectl exec writer -- cat /data/log")
	for _, p := range []string{"restored", "cloned"} {
		if got := r.sh("kubectl exec " + p + " -- cat /data/log"); got != want || want == "" {
			r.Errorf("%s holds %q, want %q", p, got, want)
		}
	}
}

// grown: the volume has its size at once; an ext4 that is mounted grows when the pod starts next, where the
// agent has no CAP_SYS_RESOURCE.
func (r *reader) grown() {
	r.Helper()
	r.wait("the volume to be larger", func() error {
		_, err := r.try(`pv=$(kubectl get pvc data -o jsonpath='{.spec.volumeName}'); test "$(kubectl get pv $pv -o jsonpath='{.spec.capacity.storage}')" = 2Gi`)
		return err
	})
	r.sh("kubectl delete pod writer --grace-period=0")
	r.apply(user("writer", "data", "")) // first.yaml would take the claim's size back
	r.running("writer")
	r.says("2Gi", "kubectl get pvc data -o jsonpath='{.status.capacity.storage}'")
	r.wait("the filesystem to be larger", func() error {
		_, err := r.try(`test "$(kubectl exec writer -- df -P -k /data | awk 'END { print $2 }')" -gt 1800000`)
		return err
	})
}

// useClasses uses those of the example that this kernel can have, and sees why the others cannot be used.
func (r *reader) useClasses() {
	r.Helper()
	r.sh("kubectl -n quarry-system rollout status deployment/quarry-controller && kubectl -n quarry-system rollout status daemonset/quarry-node")
	r.wait("the domains of directories to be open", func() error {
		open := r.domains()
		for _, d := range []string{"local", "disk", "share"} {
			if !open[d] {
				return fmt.Errorf("domain %s is not: %v", d, open)
			}
		}
		return nil
	})
	r.apply(pvc("shared", "shared", "ReadWriteMany", "64Mi", "") + user("shared-1", "shared", r.nodes[0]) + user("shared-2", "shared", r.nodes[1]))
	r.running("shared-1", "shared-2")
	r.sh("kubectl exec shared-1 -- sh -c 'echo seen >/data/file'")
	r.says("seen", "kubectl exec shared-2 -- cat /data/file")
	r.apply(pvc("fast", "fast", "ReadWriteOnce", "1Gi", "") + user("fast", "fast", "") + pvc("precious", "precious", "ReadWriteOnce", "64Mi", "") + user("precious", "precious", ""))
	// Opening it loads the module, where there is one; that it is there says nothing.
	if f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0); err == nil {
		f.Close() // nothing was written
		r.Fatal("this kernel has device-mapper: then the classes fast and precious could be used, and this test should")
	}
	r.says("crypt", "kubectl describe pvc precious")
	r.says("Pending", "kubectl get pvc fast -o jsonpath='{.status.phase}'")
	r.says("pool", "kubectl quarry domains")
	r.sh("kubectl delete pod fast precious shared-1 shared-2 --grace-period=0 --ignore-not-found && kubectl delete pvc fast precious shared")
}

// domains by name, and whether they are open on all their nodes.
func (r *reader) domains() map[string]bool {
	r.Helper()
	var all []struct {
		Name string
		Open bool
	}
	r.must(json.Unmarshal([]byte(r.sh("kubectl quarry domains -o json")), &all))
	open := map[string]bool{}
	for _, d := range all {
		before, seen := open[d.Name]
		open[d.Name] = d.Open && (before || !seen)
	}
	return open
}

// upgraded: all pods are new, and the pod that used its volume all the time has not been started again.
func (r *reader) upgraded() {
	r.Helper()
	r.sh("kubectl -n quarry-system rollout status deployment/quarry-controller && kubectl -n quarry-system rollout status daemonset/quarry-node")
	r.wait("all pods to have the newer image", func() error {
		_, err := r.try(`test "$(kubectl -n quarry-system get pods -l app.kubernetes.io/name=quarry -o jsonpath='{.items[*].spec.containers[?(@.name=="quarry")].image}' | tr ' ' '\n' | sort -u)" = docker.io/library/quarry:` + newerTag)
		return err
	})
	count := func() string { return strings.TrimSpace(r.sh("kubectl exec writer -- sh -c 'wc -l </data/ticks'")) }
	before := count()
	r.wait("the pod to write on", func() error {
		if now := count(); now == before {
			return fmt.Errorf("it has written %s lines", now)
		}
		return nil
	})
	if restarts := strings.TrimSpace(r.sh("kubectl get pod writer -o jsonpath='{.status.containerStatuses[0].restartCount}'")); restarts != "0" {
		r.Errorf("the pod was started again %s times", restarts)
	}
	r.apply(pvc("after", "quarry", "ReadWriteOnce", "64Mi", "") + user("after", "after", ""))
	r.running("after")
	r.sh("kubectl delete pod after --grace-period=0 && kubectl delete pvc after")
}

// nodeIsBack: the page speaks of one that is off for good; this one comes back, for what follows.
func (r *reader) nodeIsBack(node string) {
	r.Helper()
	r.command("start", "node", node)
	r.mountDisks(node)
	r.says("True", "kubectl get node "+node+` -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}'`)
	r.sh("kubectl taint node " + node + " node.kubernetes.io/out-of-service-")
	r.sh("kubectl -n quarry-system delete pod -l app.kubernetes.io/component=node --field-selector spec.nodeName=" + node) // it may have been there before the disk
	r.sh("kubectl -n quarry-system rollout status daemonset/quarry-node")
}

// deleteVolumes: "volumes first".
func (r *reader) deleteVolumes() {
	r.Helper()
	r.sh("kubectl delete pod --all --grace-period=0 && kubectl delete volumesnapshot,pvc --all")
	r.wait("the volumes to be gone", func() error { _, err := r.try(noVolumes); return err })
}

// uninstalled: nothing runs, and the domains are as they were.
func (r *reader) uninstalled() {
	r.Helper()
	r.wait("Quarry's pods to be gone", func() error {
		_, err := r.try(`test -z "$(kubectl -n quarry-system get pods -o name)"`)
		return err
	})
	for _, n := range r.nodes {
		if tags := r.on(n, "ls /var/lib/quarry/local/tags"); strings.TrimSpace(tags) == "" {
			r.Errorf("the domain on %s is gone", n)
		}
	}
}
