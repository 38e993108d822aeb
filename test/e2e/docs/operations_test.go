package docs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// operate runs what docs/OPERATIONS.md says of Kubernetes, on the installation of docs/INSTALL.md with its
// example's domains.
func (r *reader) operate() {
	r.Helper()
	const (
		leader  = `leader=$(kubectl --namespace quarry-system get lease quarry-controller -o jsonpath='{.spec.holderIdentity}')`
		forward = "kubectl --namespace quarry-system port-forward pod/$leader 9811 &"
		ask     = "curl -H 'Quarry-Admin: 1' http://127.0.0.1:9811/v1/domains"
		imports = "kubectl quarry import ... --claim shop/data -o yaml | kubectl apply -f -"
	)
	r.follow("docs/OPERATIONS.md", given{
		before: map[string]func(){
			imports: func() {
				r.on(r.nodes[0], `mkdir -p /mnt/share/import; cd /mnt/share/import; truncate -s 64M disk.img; mkfs.ext4 -q disk.img
					mkdir -p /run/disk; mount -o loop disk.img /run/disk; echo kept >/run/disk/file; umount /run/disk`)
				r.sh("kubectl create namespace shop")
				r.apply(strings.ReplaceAll(pvc("data", `""`, "ReadWriteOnce", "64Mi", ""), "{name: data}", "{name: data, namespace: shop}"))
			},
		},
		after: map[string]func(string){
			ask: func(said string) {
				if !strings.Contains(said, `"local"`) {
					r.Errorf("%s says %s", ask, said)
				}
				r.sh("kill $(cat forward.pid)")
			},
			imports: func(string) {
				r.apply(strings.ReplaceAll(user("user", "data", ""), "{name: user}", "{name: user, namespace: shop}"))
				r.sh("kubectl -n shop wait pod/user --for=condition=Ready --timeout=5m")
				r.says("kept", "kubectl -n shop exec user -- cat /data/file")
				// "It is kept when the claim is deleted": the test leaves nothing.
				pv := strings.TrimSpace(r.sh("kubectl -n shop get pvc data -o jsonpath='{.spec.volumeName}'"))
				r.sh("kubectl delete namespace shop")
				r.says("Released", "kubectl get pv "+pv+" -o jsonpath='{.status.phase}'")
				r.sh("kubectl patch pv " + pv + ` --patch '{"spec": {"persistentVolumeReclaimPolicy": "Delete"}}'`)
			},
			"kubectl quarry check": func(said string) {
				r.table()
			},
		},
		other: map[string][2]string{
			leader:                 {"true", "each command has a shell of its own here: it is asked in the next one"},
			forward:                {leader + "; kubectl --namespace quarry-system port-forward pod/$leader 9811 >/dev/null 2>&1 & echo $! >forward.pid", "it goes on in the background"},
			ask:                    {strings.Replace(ask, "curl ", "curl -fsS --retry 60 --retry-delay 1 --retry-all-errors ", 1), "nobody looks whether the port-forward is there yet"},
			"kubectl quarry check": {"kubectl quarry check || test $? -eq 2", "a person has to look, it says: the pool of the example is not open"},
			"kubectl quarry fix":   {"kubectl quarry fix || test $? -eq 2", "the same"},
			imports:                {strings.Replace(imports, "...", "legacy --domain share --source disk.img", 1), "that is what the dots stand for, as in the section's example"},
		},
		sections: map[string]string{
			"Running it":                        "one machine without Kubernetes: test/behaviour and cmd/quarry run it",
			"Controller and agents":             "the chart starts them",
			"When the file changes":             "the text names programs",
			"A logical volume":                  inTheLab,
			"Engines in processes of their own": "cmd/quarry and test/python run them",
		},
		not: map[string]string{
			"kubectl quarry import legacy --domain local --source disk.img --dry-run": "one machine without Kubernetes: cmd/kubectl-quarry and test/behaviour run it",
			"kubectl quarry import legacy --domain local --source disk.img":           "the same",
			"mkdir -p /srv/quarry/import":                                             "the same",
			"cp --reflink=auto --sparse=always old/disk.img /srv/quarry/import/":      "the same",
			"quarry standalone": "the text names the program",
			"kubectl quarry":    "the text names the program",
			"kubectl describe":  "it is run for a claim, as docs/INSTALL.md has it",
			"quarry controller": "the text names the program",
		},
		blocks: operationsBlocks(),
	})
}

// table runs every command of the table of kubectl quarry.
func (r *reader) table() {
	r.Helper()
	image := strings.TrimSpace(r.sh(`kubectl get pv -o jsonpath='{.items[0].spec.csi.volumeHandle}'`))
	domain := strings.SplitN(image, "/", 2)[0]
	as := map[string][]string{
		"domains": {"domains", "domains -o wide"},
		`images [--domain D] [--kind volume\|snapshot]`: {"images", "images --domain " + domain + " --kind volume", "images --kind snapshot -o yaml"},
		"chain IMAGE":    {"chain " + image},
		"operations":     {"operations"},
		"usage":          {"usage", "usage -o wide"},
		"check [DOMAIN]": {"check", "check " + domain},
		"fix [DOMAIN] [--id ID] [--kind KIND] [--yes]": {"fix", "fix " + domain + " --kind clean", "fix --kind clean --yes"},
		"version":                                       {"version"},
		"import NAME --domain D --source S":             nil, // below on the page
		"engine check ENGINE --param NAME=VALUE":        nil, // for storage of this machine: cmd/kubectl-quarry runs it
		"engine check --socket PATH --param NAME=VALUE": nil, // the same, and test/python
	}
	page, err := os.ReadFile(filepath.Join(r.checkout, "docs/OPERATIONS.md"))
	r.must(err)
	_, rows, ok := strings.Cut(string(page), "| command | |\n|---|---|\n")
	if !ok {
		r.Fatal("docs/OPERATIONS.md has no table of commands any more")
	}
	var there []string
	for line := range strings.Lines(rows) {
		if !strings.HasPrefix(line, "| `") {
			break
		}
		command := strings.Split(line, "`")[1]
		there = append(there, command)
		scripts, known := as[command]
		if !known {
			r.Errorf("nobody runs kubectl quarry %s", command)
		}
		for _, s := range scripts {
			r.Logf("kubectl quarry %s", s)
			// Status 2: it was done, and a person has to look; the pool of the example is not open.
			r.sh("kubectl quarry " + s + " || test $? -eq 2")
		}
	}
	for command := range as {
		if !slices.Contains(there, command) {
			r.Errorf("docs/OPERATIONS.md does not have %q any more", command)
		}
	}
}

// operationsBlocks are no files of a reader's.
func operationsBlocks() map[string]string {
	return map[string]string{
		"domains:\n- name: local              # a DNS label":   "every field of a domain: test/chart gives them all to the chart",
		"apiVersion: v1\nkind: Secret":                         "an encrypted class, which this kernel cannot have",
		"apiVersion: rbac.authorization.k8s.io/v1\nkind: Role": "test/e2e asks with these rights, and with less",
		"# ClusterRole": "test/chart compares the chart's",
	}
}
