from makemoe.shakespeare import main

main()
