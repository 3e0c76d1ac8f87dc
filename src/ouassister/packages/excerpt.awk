# Keeps of apt's package lists what a simulation installs.
#     awk -v target=FOLDER -f excerpt.awk SIMULATION RS= LIST...
# Source: deb822(5), apt-get(8) "-s"; an empty RS reads one stanza a record (POSIX awk).

RS != "" {
    # Inst NAME[:ARCH] [OLD] (NEW RELEASES [ARCH]) ...
    if ($1 == "Inst" && match($0, / \([^ ]+ /)) {
        version = substr($0, RSTART + 2, RLENGTH - 3)
        if (match($0, /\[[^] []+\]\)/)) {
            name = $2
            sub(/:.*/, "", name)
            names[name] = 1
            wanted[name " " version " " substr($0, RSTART + 1, RLENGTH - 3)] = 1
        }
    }
    next
}

FNR == 1 {
    close(output)
    output = FILENAME
    sub(/.*\//, "", output)
    output = target "/" output
}

# Every archive software puts the name first; deb822 does not demand it.
$1 == "Package:" && !($2 in names) { next }

{
    identity["Package"] = identity["Version"] = identity["Architecture"] = ""
    lines = split($0, line, "\n")
    for (i = 1; i <= lines; i++) {
        colon = index(line[i], ":")
        key = substr(line[i], 1, colon - 1)
        if (key in identity) {
            value = substr(line[i], colon + 1)
            gsub(/[ \t]/, "", value)
            identity[key] = value
        }
    }
    if ((identity["Package"] " " identity["Version"] " " identity["Architecture"]) in wanted)
        printf "%s\n\n", $0 > output
}
